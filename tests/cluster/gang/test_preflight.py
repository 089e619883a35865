"""Checks of memory, shared memory and disk, fed with small numbers."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.gang.preflight import (
    OBJECT_STORE_BYTES,
    Available,
    NotEnoughResources,
    _free_memory,
    check_disk,
    check_local,
    check_resources,
    measure,
)

GIB = 2**30
PLENTY = Available(memory_bytes=8 * GIB, shm_bytes=GIB, ray_disk_bytes=GIB, run_disk_bytes=GIB)
CONFIG = ClusterConfig(num_workers=2)


@pytest.mark.parametrize(
    ("shortage", "message"),
    [
        ({"shm_bytes": 64 * 2**20}, r"80 MiB of shared memory, but /dev/shm has 64 MiB free\. .*--shm-size=1g"),
        ({"memory_bytes": GIB}, r"2 workers and Ray need about 1\.3 GiB of memory, but only 1\.0 GiB .*num_workers"),
        ({"ray_disk_bytes": 2**20}, r"session folder needs about 100 MiB of disk at .*, but only 1 MiB .*RAY_TMPDIR"),
    ],
)
def test_a_shortage_names_need_supply_and_way_out(shortage, message):
    check_local(CONFIG, PLENTY)
    with pytest.raises(NotEnoughResources, match=message):
        check_local(CONFIG, replace(PLENTY, **shortage))


def test_memory_of_the_model_counts_for_every_worker():
    check_local(CONFIG, PLENTY, model_bytes_per_worker=3 * GIB)
    with pytest.raises(NotEnoughResources, match=r"need about 9\.3 GiB"):
        check_local(CONFIG, PLENTY, model_bytes_per_worker=4 * GIB)


def test_too_little_disk_for_the_run_names_the_folder():
    check_disk(10, 10, Path("/runs"), "the run", "use another")
    with pytest.raises(
        NotEnoughResources, match=r"the run needs about 2\.0 GiB of disk at /runs, but only 1\.0 GiB are"
    ):
        check_disk(GIB, 2 * GIB, Path("/runs"), "the run", "use another")


def test_a_run_directory_that_does_not_exist_yet_is_measured_on_its_parents_disk(tmp_path):
    assert check_resources(CONFIG, tmp_path / "runs" / "new") == ""
    free = shutil.disk_usage(tmp_path).free
    tight = check_resources(CONFIG, tmp_path / "runs" / "new", run_disk_bytes=int(free / 1.2))
    assert tight.startswith("the disk is tight: the run will write about ")
    with pytest.raises(NotEnoughResources, match=r"choose another disk with --run\.dir"):
        check_resources(CONFIG, tmp_path / "runs" / "new", run_disk_bytes=2**60)


def test_shared_memory_was_measured_where_ray_needs_it():
    assert measure(Path()).shm_bytes >= OBJECT_STORE_BYTES


def test_memory_is_bounded_by_the_containers_limit_without_counting_cached_files(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:  3000 kB\n")
    assert _free_memory(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\n")
    assert _free_memory(meminfo, tmp_path) == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert _free_memory(meminfo, tmp_path) == 3000 * 1024
