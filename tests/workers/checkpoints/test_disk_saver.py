"""Checkpoints that are written beside the training, and disks that do not take them."""

import contextlib
import resource
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.workers.checkpoints.checkpoint_contents import differing
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.checkpoints import disk_saver
from workers.checkpoints.checkpoint_files import CHECKPOINTS, CheckpointError, enough_to_remove, list_checkpoints
from workers.record.run_log import read_events, read_load_history, read_metrics


def _named(spec, name, **run):
    return replace(spec, run_dir=spec.run_dir.parent / name, run=replace(spec.run, **run))


def _at_step(worker, step, do):
    """Call `do` in the forward of a step, on this rank."""
    seen = []

    def count(_module, _inputs):
        seen.append(True)
        if len(seen) == step:
            do()

    worker._state.model.register_forward_pre_hook(count)


# --- beside the training


def _hold_the_write_of_step_3_until_step_6(rank, world_size, spec):
    join_worker(_named(spec, "sync", async_checkpoints=False), rank, world_size, "sync").train()
    worker = join_worker(_named(spec, "async"), rank, world_size, "async")
    go_on, save = threading.Event(), disk_saver.checkpoint.save
    _at_step(worker, 6, go_on.set)

    def held_back(*args, **named):
        assert go_on.wait(20)
        return save(*args, **named)

    disk_saver.checkpoint.save = held_back
    try:
        worker.train()
    finally:
        disk_saver.checkpoint.save = save
    expected = whole_state(worker)
    resumed = join_worker(_named(spec, "async"), rank, world_size, "resumed")
    resumed.train(spec.run_dir.parent / "async" / CHECKPOINTS / "step_00000003")
    state = whole_state(resumed)
    return [name for name in expected if not torch.equal(state[name], expected[name])]


def test_what_is_written_beside_the_training_is_the_state_of_its_step(tmp_path):
    spec = make_spec(tmp_path, steps=8, checkpoint_every=3, keep_checkpoints=9)
    assert run_ranks(2, _hold_the_write_of_step_3_until_step_6, spec) == [[], []]
    folders = {name: tmp_path / name / CHECKPOINTS for name in ("sync", "async")}
    assert [path.name for path in list_checkpoints(folders["sync"])] == [f"step_0000000{n}" for n in (3, 6, 8)]
    for path in list_checkpoints(folders["sync"]):
        assert differing(folders["async"] / path.name, path) == []
    events = [event for event in read_events(tmp_path / "async") if event["event"] == "checkpoint"]
    assert [event["step"] for event in events[:3]] == [3, 6, 8]
    # Steps 4 and 5 were trained while step 3 was held back: only the copy stopped the training.
    assert events[0]["blocked_s"] < events[0]["write_s"]
    assert events[0]["bytes"] == sum(file.stat().st_size for file in (folders["async"] / "step_00000003").iterdir())


# --- a disk that fails


def _fail_on_rank_1_at_step_4(rank, world_size, spec):
    worker = join_worker(spec, rank, world_size, "failing")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        # A write beyond this size fails the way a full disk does.
        _at_step(worker, 3, lambda: (_wait_for_writer(), resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))))
        _at_step(worker, 5, lambda: (_wait_for_writer(), resource.setrlimit(resource.RLIMIT_FSIZE, limit)))
    outcome = worker.train()
    state = whole_state(worker)
    worker = join_worker(_named(spec, "untroubled"), rank, world_size, "untroubled")
    worker.train()
    expected = whole_state(worker)
    return outcome.completed, [name for name in expected if not torch.equal(state[name], expected[name])]


def _wait_for_writer():
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join(20)


def test_a_disk_that_fails_costs_an_event_and_not_the_run(tmp_path):
    spec = make_spec(tmp_path, steps=8, checkpoint_every=2, keep_checkpoints=9)
    assert run_ranks(2, _fail_on_rank_1_at_step_4, spec) == [(True, [])] * 2
    events = [(e["event"], e["step"]) for e in read_events(tmp_path / "run") if e["event"].startswith("checkpoint")]
    assert events == [("checkpoint", 2), ("checkpoint_failed", 4), ("checkpoint", 6), ("checkpoint", 8)]
    reason = next(e["reason"] for e in read_events(tmp_path / "run") if e["event"] == "checkpoint_failed")
    assert "failed on rank 1" in reason
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "run" / CHECKPOINTS)] == ["2", "6", "8"]


# --- a disk that is full, for real


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system of its own can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def _fill(disk):
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(b"x" * 1000)


def _train_on_a_full_disk(rank, world_size, spec, disk):
    worker = join_worker(replace(spec, run_dir=disk / "run"), rank, world_size, "full")
    lines = worker._lines

    def free():
        (disk / "ballast").unlink()

    if rank == 0:
        _at_step(worker, 3, lambda: (_wait_for_writer(), _fill(disk)))
        _at_step(worker, 7, lambda: (_wait_for_writer(), free()))
        _at_step(worker, 9, lambda: (_wait_for_writer(), _fill(disk)))
        disk_saver.RETRY_S = 0.1
        wait_for_room = worker._stop_requested.wait

        def free_at_the_second_try(seconds):
            free_at_the_second_try.calls += 1
            if free_at_the_second_try.calls == 2:
                free()
            return wait_for_room(seconds)

        free_at_the_second_try.calls = 0
        worker._stop_requested.wait = free_at_the_second_try
    else:
        disk_saver.RETRY_S = 0.1
    worker.train()
    state = whole_state(worker)
    worker = join_worker(_named(spec, "roomy"), rank, world_size, "roomy")
    worker.train()
    expected = whole_state(worker)
    return [line for line in lines if "event" in line], [
        name for name in expected if not torch.equal(state[name], expected[name])
    ]


def test_a_full_disk_costs_warnings_and_no_record(tmp_path, small_disk):
    spec = make_spec(tmp_path, steps=10, checkpoint_every=2, keep_checkpoints=2)
    (told, changed), _ = run_ranks(2, _train_on_a_full_disk, spec, small_disk)
    assert changed == []
    full, roomy = small_disk / "run", tmp_path / "roomy"
    assert [(e["event"], e["step"]) for e in read_events(full) if e["event"].startswith("checkpoint")] == [
        ("checkpoint", 2), ("checkpoint_failed", 4), ("checkpoint_failed", 6), ("checkpoint", 8),
        ("checkpoint_waits", 10), ("checkpoint", 10),
    ]  # fmt: skip
    warnings = [line["text"] for line in told if line["event"] == "warning"]
    assert "cannot write" in warnings[0]
    assert "free some space" in warnings[0]
    assert "complete on the disk again" in warnings[1]
    waits = next(line for line in told if line["event"] == "checkpoint_waits")
    assert "free in" in waits["reason"]
    # Everything that waited in memory is there.
    assert [line["step"] for line in read_metrics(full)[0]] == list(range(1, 11))
    assert read_load_history(full).counts.tolist() == read_load_history(roomy).counts.tolist()
    for step in ("step_00000008", "step_00000010"):
        assert differing(full / CHECKPOINTS / step, roomy / CHECKPOINTS / step) == []
    assert len(list_checkpoints(full / CHECKPOINTS)) == 2


def _give_up(rank, world_size, spec, disk):
    errors = {}
    for name, wait_s in (("time is over", 0.0), ("asked to", 100.0)):
        worker = join_worker(
            replace(_named(spec, name, full_disk_wait_s=wait_s), run_dir=disk / name), rank, world_size, name
        )
        if rank == 1:
            _at_step(worker, 2, lambda: _fill(disk))
        if rank == 0:
            wait = worker._stop_requested.wait

            def ask(seconds, worker=worker, wait=wait):
                worker.request_stop()  # as Ctrl-C does
                return wait(seconds)

            worker._stop_requested.wait = ask
        disk_saver.RETRY_S = 0.1
        with pytest.raises(CheckpointError, match="free") as caught:
            worker.train()
        errors[name] = str(caught.value)  # both ranks have agreed on it: neither tries again
        worker.leave()
        if rank == 1:
            (disk / "ballast").unlink()
        while (disk / "ballast").exists():  # the next gang's rendezvous needs room; no group is left to wait in
            time.sleep(0.01)
    return errors


def test_a_disk_that_stays_full_ends_the_run_on_all_ranks_alike(tmp_path, small_disk):
    spec = make_spec(tmp_path, steps=2)
    first, second = run_ranks(2, _give_up, spec, small_disk)
    assert first == second
    assert list_checkpoints(Path(small_disk) / "asked to" / CHECKPOINTS) == []


def _finish_with_room_for_two(rank, world_size, spec, disk):
    worker = join_worker(replace(spec, run_dir=disk / "run"), rank, world_size, "crowded")
    if rank == 0:
        # Less room than a checkpoint of 1.1 MB needs, but not without one of the two that are there.
        _at_step(worker, 6, lambda: (_wait_for_writer(), _leave_free(disk, 700_000)))
    return worker.train().completed


def _leave_free(disk, num_bytes):
    with (disk / "ballast").open("wb") as ballast:
        ballast.write(b"x" * (shutil.disk_usage(disk).free - num_bytes))


def test_the_last_checkpoint_takes_the_room_of_the_oldest_and_says_so_before(tmp_path, small_disk):
    spec = make_spec(tmp_path, steps=6, checkpoint_every=2, keep_checkpoints=3)
    assert run_ranks(2, _finish_with_room_for_two, spec, small_disk) == [True, True]
    told = [e for e in read_events(small_disk / "run") if e["event"].startswith("checkpoint")]
    assert [(e["event"], e["step"]) for e in told] == [
        ("checkpoint", 2), ("checkpoint", 4), ("checkpoints_removed", 6), ("checkpoint", 6),
    ]  # fmt: skip
    assert told[2]["removed"] == [2]
    # The newest complete one stays until the last is there, whatever that costs.
    assert [path.name[-1] for path in list_checkpoints(small_disk / "run" / CHECKPOINTS)] == ["4", "6"]


def test_nothing_is_removed_where_it_would_not_make_enough_room(tmp_path):
    for step in (1, 2, 3):
        path = tmp_path / f"step_0000000{step}"
        path.mkdir()
        (path / "file").write_bytes(b"x" * 100)
    assert [path.name[-1] for path in enough_to_remove(tmp_path, 100)] == ["1"]
    assert [path.name[-1] for path in enough_to_remove(tmp_path, 101)] == ["1", "2"]
    assert enough_to_remove(tmp_path, 201) == []
