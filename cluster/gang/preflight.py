"""Checks, before any process starts, that this machine has the memory, shared memory and disk that a run needs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.machine.node_state import ray_folder
from cluster.ray.local_ray import OBJECT_STORE_BYTES
from cluster.ray.ray_folder import check_folder
from dispatch.errors import InvalidValue

# Resident memory measured on Linux with ray 2.60 and torch 2.13 (CPU): of Ray's own processes together, and of one
# worker that has imported torch and holds no model yet.
RAY_BYTES = 700 * 2**20
WORKER_BYTES = 300 * 2**20
RAY_DISK_BYTES = 100 * 2**20  # Logs and sockets of a session.
TIGHT_FACTOR = 1.5  # A disk with less than this multiple of what the run writes is tight: other programs write too.


class NotEnoughResources(InvalidValue):
    """This machine lacks memory, shared memory or disk for the run."""


@dataclass(frozen=True, kw_only=True)
class Available:
    """What this machine has free, in bytes."""

    memory_bytes: int
    shm_bytes: int
    ray_disk_bytes: int
    run_disk_bytes: int


def check_resources(
    config: ClusterConfig, run_dir: Path, *, run_disk_bytes: int = 0, model_bytes_per_worker: int = 0
) -> str:
    """Check that this machine can hold the run. Returns a warning where the disk is tight, else "".

    Args:
        run_disk_bytes: what the run will write into `run_dir`, which need not exist yet.
        model_bytes_per_worker: memory of one worker beyond WORKER_BYTES.
    Raises:
        NotEnoughResources: names what is missing, and a way out.

    On a joined cluster only the run directory is checked: the workers run on other machines.
    """
    available = measure(run_dir)
    check_disk(available.run_disk_bytes, run_disk_bytes, run_dir, "the run", "choose another disk with --run.dir")
    if config.address is None:
        check_local(config, available, model_bytes_per_worker)
    if available.run_disk_bytes > TIGHT_FACTOR * run_disk_bytes:
        return ""
    needed, free = size_text(run_disk_bytes), size_text(available.run_disk_bytes)
    return f"the disk is tight: the run will write about {needed} to {run_dir}, where {free} are free"


def check_local(config: ClusterConfig, available: Available, model_bytes_per_worker: int = 0) -> None:
    """Check that a local Ray with these workers fits into `available`.

    Raises:
        NotEnoughResources: it does not.
        InvalidValue: RAY_TMPDIR names no folder that Ray can use.
    """
    check_folder()
    way_out = "set RAY_TMPDIR to another disk"
    check_disk(available.ray_disk_bytes, RAY_DISK_BYTES, ray_folder(), "Ray's session folder", way_out)
    if available.shm_bytes < OBJECT_STORE_BYTES:
        raise NotEnoughResources(
            f"Ray needs {size_text(OBJECT_STORE_BYTES)} of shared memory, but /dev/shm has "
            f"{size_text(available.shm_bytes)} free. Free some, enlarge it "
            "(`mount -o remount,size=1G /dev/shm`), or start the container "
            "with --shm-size=1g"
        )
    needed = RAY_BYTES + config.num_workers * (WORKER_BYTES + model_bytes_per_worker)
    if available.memory_bytes < needed:
        raise NotEnoughResources(
            f"{config.num_workers} workers and Ray need about {size_text(needed)} of memory, but only "
            f"{size_text(available.memory_bytes)} are free. Close other programs, lower --cluster.num_workers, or use "
            "a smaller model or batch (--run.micro_batch_size)"
        )


def check_disk(free_bytes: int, needed_bytes: int, path: Path, what: str, way_out: str) -> None:
    """Raise NotEnoughResources if `path`'s disk has less than `needed_bytes` free for `what`."""
    if free_bytes < needed_bytes:
        raise NotEnoughResources(
            f"{what} needs about {size_text(needed_bytes)} of disk at {path}, but only {size_text(free_bytes)} are "
            f"free. Free some, or {way_out}"
        )


def measure(run_dir: Path) -> Available:
    """Free memory within this container's limit, and free space of the file systems that a run uses."""
    shm = Path("/dev/shm")  # noqa: S108
    return Available(
        memory_bytes=_free_memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup")),
        # On a system without /dev/shm, such as macOS, Ray keeps its object store on disk: nothing is lacking.
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else OBJECT_STORE_BYTES,
        ray_disk_bytes=_free_disk(ray_folder()),
        run_disk_bytes=_free_disk(run_dir),
    )


def _free_disk(path: Path) -> int:
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _free_memory(meminfo: Path, cgroup: Path) -> int:
    """Bytes that programs can still allocate: the machine's, or what the container's limit (cgroup v2) leaves."""
    lines = (line.split() for line in meminfo.read_text().splitlines())
    free = next(int(fields[1]) * 1024 for fields in lines if fields[0] == "MemAvailable:")
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        counted = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # No such files, or "max": no limit.
        return free
    # memory.current counts the page cache of files, which the kernel gives back under pressure.
    return min(free, limit - used + int(counted.get("inactive_file", 0)))


def size_text(num_bytes: float) -> str:
    """'1.5 GiB', below one GiB '80 MiB'."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
