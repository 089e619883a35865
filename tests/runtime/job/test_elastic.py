"""A run on a cluster whose nodes die, come, and are taken back: other numbers of workers, the same training."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.settings.config import feasible_sizes
from tests.runtime.job.test_job import ROOT, _arguments, _config
from workers.checkpoints.checkpoint import list_checkpoints
from workers.distributed.parallel import ParallelConfig
from workers.record.run_log import read_events, read_metrics

TRIMTAB = Path(sys.executable).with_name("trimtab")
SETTINGS = (
    "--name=elastic",
    "--steps=100000",  # stopped by Ctrl-C
    "--run.checkpoint_every=0",
    "--run.memory_checkpoint_every=2",
    "--run.eval_every=0",
    "--run.global_batch_size=8",
    "--model.max_seq_len=256",
    "--cluster.min_workers=1",
    "--cluster.grow_every_s=1",
    "--cluster.threads_per_worker=1",  # nodes of this machine each count all of its cores
)


# P23
@pytest.mark.slow
def test_a_run_shrinks_grows_and_moves_with_its_nodes_and_trains_the_same(tmp_path):
    run_dir = tmp_path / "runs" / "elastic"
    command = [sys.executable, "-m", "tests.runtime.job.elastic_cluster", run_dir, *_arguments(tmp_path, *SETTINGS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = ("started", "failed", "recovering", "moving", "interrupted", "resumed", "recovered")
    events = [event for event in read_events(run_dir) if event["event"] in names]
    recovery, move = ["failed", "recovering", "resumed", "recovered"], ["moving", "interrupted", "resumed", "recovered"]
    assert [event["event"] for event in events] == ["started", *recovery, *move, *move, "interrupted"]
    moves = [(event["workers_before"], event["workers"]) for event in events if "workers_before" in event]
    assert moves == [(2, 1), (1, 2), (2, 2)]
    assert [event["reason"] for event in events if event["event"] == "moving"] == [
        "the cluster has room for more",
        "a node is being taken back",
    ]
    # The one that was left had the state of both in its memory; nothing was on the disk.
    (from_memory,) = [event for event in read_events(run_dir) if event.get("from_memory")]
    assert from_memory["step"] == next(event["step"] for event in events if event["event"] == "resumed") >= 2
    _check_same_training(run_dir, tmp_path)


def _check_same_training(run_dir: Path, folder: Path) -> None:
    elastic = [(line["step"], line["loss"]) for line in read_metrics(run_dir)[0]]
    last = elastic[-1][0]
    assert [step for step, _ in elastic] == list(range(1, last + 1))
    shrunk, grown, _ = (event["step"] for event in read_events(run_dir) if event["event"] == "resumed")
    # To the bit: at the same sizes the sums of a step are made in the same order. Against one worker all the way only
    # the first steps could be compared, since a rounding can move a token across the edge of the law's statistic.
    assert [loss for _, loss in elastic] == _train_at_sizes(folder, [(2, shrunk), (1, grown), (2, last)])


def _train_at_sizes(folder: Path, sizes: list[tuple[int, int]]) -> list[float]:
    """Losses of the same run on a calm cluster: (workers, last step) of each part, each resumed from the disk."""
    run_dir = folder / "runs" / "static"
    options = ["--cluster.min_workers=0", "--run.checkpoint_every=1", "--run.keep_checkpoints=1000"]
    start = _arguments(folder, *SETTINGS, "--name=static")
    for workers, last in sizes:
        run = subprocess.Popen([TRIMTAB, "train", *start, *options, f"--workers={workers}"], cwd=folder)
        give_up = time.monotonic() + 240.0
        while f"step_{last:08d}" not in [path.name for path in list_checkpoints(run_dir / "checkpoints")]:
            assert run.poll() is None and time.monotonic() < give_up
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130  # it saved, some steps later
        start = ["--resume", str(run_dir), f"--step={last}"]
    return [line["loss"] for line in read_metrics(run_dir)[0]][: sizes[-1][1]]


def test_sizes_between_the_bounds_share_the_batch_equally_and_leave_no_rank_without_experts(tmp_path):
    config = _config(tmp_path, "--run.global_batch_size=24", "--workers=4")  # 8 experts

    def sizes(min_workers: int, max_workers: int, **run) -> tuple[int, ...]:
        cluster = replace(config.cluster, min_workers=min_workers, max_workers=max_workers)
        return feasible_sizes(replace(config, cluster=cluster, run=replace(config.run, **run)))

    assert sizes(0, 0) == (4,)
    assert sizes(1, 0) == (4, 3, 2, 1)
    assert sizes(2, 24) == (8, 6, 4, 3, 2)
    assert sizes(1, 0, micro_batch_size=6) == (4, 2, 1)  # three workers would have 8 sequences each


def test_an_ep_size_that_no_longer_divides_the_ranks_is_chosen_anew():
    parallel = ParallelConfig(ep_size=4, ranks_per_node=2, exchange="node")
    assert parallel.resized_to(8) is parallel
    assert parallel.resized_to(6) == replace(parallel, ep_size=3, ranks_per_node=0, exchange="auto")
    assert parallel.resized_to(2) == replace(parallel, ep_size=2)
    assert ParallelConfig().resized_to(5) == ParallelConfig()
    sizes = (1, 2, 3, 4, 6, 12)
    assert [ParallelConfig(ep_size=4).resized_to(size).resolve(size) for size in sizes] == [1, 2, 3, 4, 3, 4]
