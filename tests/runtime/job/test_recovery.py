"""Runs that lose workers, or their driver, and go on: real Ray, real workers, real kills, a tiny model."""

import html
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.failures.errors import GangFailed
from cluster.gang.supervisor import GaveUp
from runtime.job import job
from tests.runtime.job.test_job import _arguments, _config, _trimtab, _wait_for_step
from workers.checkpoints.checkpoint_files import checkpoint_path
from workers.record.run_log import read_events, read_load_history, read_metrics
from workers.training.step import TrainingDiverged

pytestmark = pytest.mark.slow

STEPS = 40
EVENTS_OF_A_RECOVERY = ["failed", "recovering", "resumed", "recovered"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recovery")


def _run_config(folder, name, *more):
    samples = ['--run.sample_prompts=["a"]', "--run.sample_tokens=2"]
    rhythm = [f"--steps={STEPS}", "--run.checkpoint_every=8", "--run.eval_every=16"]
    return _config(folder, f"--name={name}", *rhythm, *samples, *more)


@pytest.fixture(scope="module")
def calm(folder, ray_session) -> Path:
    assert job.train(_run_config(folder, "calm"), resume=None, step=None) == 0
    return folder / "runs" / "calm"


def _events(run_dir: Path, *names: str) -> list[dict]:
    found = read_events(run_dir) if (run_dir / "events.jsonl").exists() else []
    return [event for event in found if event["event"] in names]


def _newest_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    steps = [line["step"] for line in read_metrics(run_dir)[0]] if path.exists() else []
    return steps[-1] if steps else 0


@contextmanager
def _meanwhile(plan: Callable[[], None]) -> Iterator[None]:
    """Run `plan` on a thread: training needs the main one, for Ctrl-C."""
    thread = threading.Thread(target=plan)
    thread.start()
    try:
        yield
    finally:
        thread.join(120)
        assert not thread.is_alive()


def _wait(condition: Callable[[], object], limit_s: float = 120.0) -> None:
    give_up = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def _kill(run_dir: Path, rank: int, from_step: int) -> None:
    """kill -9 of a rank of the gang as it is now, once it has made a step from `from_step` on."""
    _wait(lambda: _newest_step(run_dir) >= from_step)
    ranks = _events(run_dir, "started", "resumed")[-1]["rank_map"]
    os.kill(ranks[rank]["pid"], signal.SIGKILL)


# P22
def test_killed_and_hanging_workers_cost_neither_a_step_nor_a_bit(calm, folder, monkeypatch):
    run_dir = folder / "runs" / "faulty"
    faults = [
        {"rank": 1, "step": 3, "phase": "experts", "action": "kill"},  # before the first checkpoint
        {"rank": 1, "step": 13, "phase": "backward", "action": "kill"},
        {"rank": 0, "step": 16, "phase": "samples", "action": "kill"},  # between an evaluation's line and its samples
        {"rank": 1, "step": 20, "phase": "dispatch", "action": "stop"},  # hangs until the bound of a collective
        {"rank": 0, "step": 29, "phase": "gradients", "action": "kill"},  # holds the store and the records
    ]
    (folder / "faults.json").write_text(json.dumps(faults))
    monkeypatch.setenv("TRIMTAB_FAULTS", str(folder / "faults.json"))
    assert job.train(_run_config(folder, "faulty", "--cluster.collective_timeout_s=10"), resume=None, step=None) == 0
    (calm_train, calm_evals), (train, evals) = read_metrics(calm), read_metrics(run_dir)
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in train] == [line["loss"] for line in calm_train]
    assert [line["val_loss"] for line in evals] == [line["val_loss"] for line in calm_evals]
    assert read_load_history(run_dir).bias.tobytes() == read_load_history(calm).bias.tobytes()
    assert _samples(run_dir) == _samples(calm)
    assert [line["step"] for line in _samples(calm)] == [0, 16, 32, 40]
    _check_events(run_dir)


def _samples(run_dir: Path) -> list[dict]:
    return [{**json.loads(line), "time": 0} for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def _check_events(run_dir: Path) -> None:
    assert [event["event"] for event in _events(run_dir, *EVENTS_OF_A_RECOVERY)] == EVENTS_OF_A_RECOVERY * 5
    failed = _events(run_dir, "failed")
    assert [(event["cause"], event["rank"], event["kind"]) for event in failed] == [
        ("lost", 1, "died"),
        ("lost", 1, "died"),
        ("lost", 0, "died"),
        ("lost", 1, "silent"),
        ("lost", 0, "died"),
    ]
    # What was found out about a hang outlives the recovery.
    assert all(
        words in failed[3]["diagnosis"] for words in ("missing: rank 1", "waits in it", "is stopped: by a signal")
    )
    assert html.escape("is stopped: by a signal") in (run_dir / "report.html").read_text()
    steps = [event["step"] for event in _events(run_dir, "resumed")]
    assert steps[0] == 0 and 8 <= steps[1] < 13 and 8 <= steps[2] < 16 and 10 <= steps[3] < 20 and 16 <= steps[4] < 29
    # The others kept their process; only the one that failed has a new one.
    pids = [[row["pid"] for row in event["rank_map"]] for event in _events(run_dir, "started", "resumed")]
    for event, before, after in zip(failed, pids[:-1], pids[1:], strict=True):
        rank = event["rank"]
        assert event["pid"] == before[rank] != after[rank] and before[1 - rank] == after[1 - rank]
    for event in _events(run_dir, "recovered"):
        assert {"others ended", "processes and imports", "join", "load", "first step"} <= event["seconds"].keys()
        known = sum(value for name, value in event["seconds"].items() if name != "of these imports")
        assert known == pytest.approx(event["total_s"], abs=1.0)


def test_a_worker_that_dies_again_and_again_ends_the_run_with_every_cause(folder, ray_session):
    run_dir = folder / "runs" / "doomed"

    def plan() -> None:
        _kill(run_dir, 1, 1)
        _wait(lambda: _events(run_dir, "recovered"))
        _kill(run_dir, 0, 1)

    config = _run_config(folder, "doomed", "--steps=100000", "--run.checkpoint_every=0", "--cluster.max_restarts=1")
    with _meanwhile(plan), pytest.raises(GaveUp, match="1 restarts without a first checkpoint") as caught:
        job.train(config, resume=None, step=None)
    lines = str(caught.value).splitlines()
    assert "1. rank 1 (127.0.0.1" in lines[1] and "2. rank 0 (127.0.0.1" in lines[2]
    assert [event["event"] for event in read_events(run_dir)][-2:] == ["failed", "gave_up"]


def test_an_error_of_the_run_itself_is_not_tried_again(folder, ray_session):
    config = _run_config(folder, "diverges", "--optim.lr=1e30", "--optim.grad_clip=1e30", "--optim.warmup_steps=0")
    with pytest.raises(GangFailed) as caught:
        job.train(config, resume=None, step=None)
    assert isinstance(caught.value.first.error, TrainingDiverged)
    assert not _events(folder / "runs" / "diverges", "recovering")
    assert _events(folder / "runs" / "diverges", "failed")[0]["cause"] == "own error"


def test_a_killed_driver_is_resumed_and_ctrl_c_in_a_recovery_is_not_lost(tmp_path):
    run_dir = tmp_path / "runs" / "orphan"
    settings = ("--name=orphan", "--steps=100000", "--run.checkpoint_every=5", "--run.eval_every=0")
    with _trimtab(tmp_path, "train", *_arguments(tmp_path, *settings)) as process:
        _wait_for_step(process, run_dir, 12)
        process.kill()
    with _trimtab(tmp_path, "train", "--resume", "orphan") as process:
        _wait(lambda: _events(run_dir, "resumed"))
        first = _events(run_dir, "resumed")[0]["step"]
        assert first >= 5 and first % 5 == 0
        _wait_for_step(process, run_dir, first + 7)
        os.kill(_events(run_dir, "resumed")[-1]["rank_map"][1]["pid"], signal.SIGKILL)
        _wait(lambda: _events(run_dir, "recovering"))
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert _events(run_dir, "recovered")
    last = _events(run_dir, "interrupted")[-1]  # rank 0 writes it, the driver "recovered": either may come first
    assert last["step"] == last["saved_step"] == _events(run_dir, "recovered")[0]["step"]
    steps = [line["step"] for line in read_metrics(run_dir)[0]]
    assert steps == list(range(1, last["step"] + 1))


def _let_go_once_saved(run_dir: Path, step: int) -> None:
    _wait(checkpoint_path(run_dir / "checkpoints", step).exists)
    (run_dir / "faults").mkdir(exist_ok=True)
    (run_dir / "faults" / "0.go").touch()


def test_a_killed_worker_costs_sharded_states_neither_a_step_nor_a_bit(folder, ray_session, monkeypatch):
    sharded = ("--steps=8", "--parallel.shard=full", "--parallel.ep_size=1", "--run.checkpoint_every=3")
    assert job.train(_run_config(folder, "sharded", *sharded), resume=None, step=None) == 0
    faults = [
        {"rank": 1, "step": 5, "phase": "forward", "action": "hold", "amount": 120},  # until the checkpoint is written
        {"rank": 1, "step": 6, "phase": "backward", "action": "kill"},
    ]
    (folder / "faults.json").write_text(json.dumps(faults))
    monkeypatch.setenv("TRIMTAB_FAULTS", str(folder / "faults.json"))
    with _meanwhile(lambda: _let_go_once_saved(folder / "runs" / "sharded-killed", step=3)):
        assert job.train(_run_config(folder, "sharded-killed", *sharded), resume=None, step=None) == 0
    runs = [folder / "runs" / name for name in ("sharded", "sharded-killed")]
    calm, killed = ([line["loss"] for line in read_metrics(run)[0]] for run in runs)
    assert len(calm) == 8 and killed == calm
    assert [event["event"] for event in _events(runs[1], *EVENTS_OF_A_RECOVERY)] == EVENTS_OF_A_RECOVERY
    assert _events(runs[1], "resumed")[0]["step"] == 3


def test_killed_and_hanging_stages_cost_neither_a_step_nor_a_bit(folder, ray_session, monkeypatch):
    stages = (
        *("--steps=16", "--run.checkpoint_every=4", "--run.eval_every=8", "--cluster.collective_timeout_s=10"),
        *("--parallel.pipeline.size=2", "--run.global_batch_size=8", "--run.micro_batch_size=2"),
        "--run.sample_prompts=[]",
    )
    assert job.train(_run_config(folder, "stages", *stages), resume=None, step=None) == 0
    # A hang first: rank 0 waits for a gradient that never comes.
    faults = [
        {"rank": 1, "step": 3, "phase": "backward", "action": "stop"},
        {"rank": 1, "step": 8, "phase": "backward", "action": "kill"},
        {"rank": 0, "step": 12, "phase": "gradients", "action": "kill"},  # has the embedding, the store and the records
    ]
    (folder / "faults.json").write_text(json.dumps(faults))
    monkeypatch.setenv("TRIMTAB_FAULTS", str(folder / "faults.json"))
    assert job.train(_run_config(folder, "stages-killed", *stages), resume=None, step=None) == 0
    runs = [folder / "runs" / name for name in ("stages", "stages-killed")]
    (calm_train, calm_evals), (train, evals) = map(read_metrics, runs)
    assert [line["step"] for line in train] == list(range(1, 17))
    assert [line["loss"] for line in train] == [line["loss"] for line in calm_train]
    assert [line["val_loss"] for line in evals] == [line["val_loss"] for line in calm_evals]
    assert read_load_history(runs[1]).bias.tobytes() == read_load_history(runs[0]).bias.tobytes()
    failed = _events(runs[1], "failed")
    assert [(event["rank"], event["kind"]) for event in failed] == [(1, "silent"), (1, "died"), (0, "died")]
    assert "waits for gradients of stage 1" in failed[0]["diagnosis"]
    steps = [event["step"] for event in _events(runs[1], "resumed")]
    assert steps[0] == 0 and 4 <= steps[1] < 8 and 8 <= steps[2] < 12
