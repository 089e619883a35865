"""A rank that hangs, leaves something out or lies, in a real run on a real local Ray: who is named, and how soon.

What ranks notice themselves, without Ray, is in tests/workers/training/test_faults.py.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import ClusterConfig
from cluster.failures.calls import call_all
from cluster.failures.errors import GangFailed
from cluster.failures.stacks import stacks_of
from cluster.gang.gang import Gang
from dispatch.diagnosis.collective_errors import CollectiveTimeout, WrongSplits
from runtime.job.launch import worker_maker
from tests.cluster.dummy_worker import DummyWorker, WaitingWorker
from tests.workers.training_gang import make_spec
from workers.distributed.parallel import ParallelConfig
from workers.training.fault_plan import Fault

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

BOUND_S = 4.0
LATE_S = 5.0  # the promise: the error comes at most this much after the bound
BUSY_S = 5.0  # what a machine may take that runs other tests beside it
CONFIG = ClusterConfig(
    num_workers=2, device="cpu", threads_per_worker=1, start_timeout_s=90.0, collective_timeout_s=BOUND_S
)
FIRST, SECOND = "layers.1.moe", "layers.2.moe"  # of three layers the first is dense
VICTIM = 1


@dataclass(frozen=True)
class Outcome:
    failed: GangFailed
    delay_s: float  # from the fault to the error

    @property
    def error(self) -> Any:
        return self.failed.first.error


def run_with(folder: Path, num_workers: int = 2, **fault: Any) -> Outcome:
    """Train on expert-parallel groups of two ranks, with one fault of rank 1 in step 3, until it fails."""
    spec = replace(
        make_spec(folder, steps=30, global_batch_size=8),
        faults=(Fault(rank=VICTIM, step=3, **fault),),
        control_timeout_s=BOUND_S,
        parallel=ParallelConfig(ep_size=2),
    )
    spec.run_dir.mkdir()
    config = replace(CONFIG, num_workers=num_workers)
    with Gang.launch(config, worker_maker(spec)) as gang, pytest.raises(GangFailed) as caught:
        gang.run("train")
    ended = time.time()
    fired = (spec.run_dir / "faults/0.fired").stat().st_mtime
    processes = [psutil.Process(row.pid) for row in gang.rank_map if psutil.pid_exists(row.pid)]
    assert not psutil.wait_procs(processes, timeout=60)[1]
    return Outcome(caught.value, ended - fired)


# P25
@pytest.mark.parametrize(
    ("fault", "where", "doing"),
    [
        (
            {"phase": "dispatch", "action": "sleep", "amount": 60, "layer": SECOND},
            ("dispatch", SECOND),
            "has been in step 3, dispatch of layers.2.moe for",
        ),
        (
            {"phase": "experts", "action": "sleep", "amount": 60},
            ("combine", FIRST),
            "has been in step 3, experts of layers.1.moe for",
        ),
        (
            {"phase": "backward dispatch", "action": "sleep", "amount": 60, "layer": FIRST},
            ("backward dispatch", FIRST),
            "has been in step 3, backward dispatch of layers.1.moe for",
        ),
        (
            {"phase": "backward", "action": "stop"},
            ("backward combine", SECOND),
            "does not answer: it is stopped",
        ),
        (
            {"phase": "gradients", "action": "skip", "num_workers": 4},  # else gradients and experts share a group
            ("gradients", ""),
            "left out step 3, gradients",
        ),
        (
            {"phase": "bias update", "action": "skip"},
            ("bias update, reduce", ""),
            "left out step 3, bias update",
        ),
    ],
    ids=[
        "sleeps before a dispatch",
        "sleeps in its experts",
        "sleeps in backward",
        "is stopped",
        "skips the gradients",
        "skips the bias update",
    ],
)
def test_a_rank_that_does_not_come_is_named_with_step_phase_and_layer(tmp_path, fault, where, doing):
    outcome = run_with(tmp_path, **fault)
    assert isinstance(outcome.error, CollectiveTimeout)
    assert outcome.error.missing_ranks == (VICTIM,) == (outcome.failed.first.rank,)
    # A stop may come before the thread beside backward has handed on the counts: then the others miss these first.
    places = {where, ("bias update, reduce", "")} if fault["action"] == "stop" else {where}
    assert outcome.error.step == 3
    assert (outcome.error.phase, outcome.error.layer) in places
    assert doing in outcome.error.details
    assert outcome.delay_s < BOUND_S + LATE_S + BUSY_S
    # Its own stack, or why it has none: it is the one that matters.
    stack = {"sleep": "faults.py", "stop": "is stopped: by a signal", "skip": "training_run.py"}[fault["action"]]
    assert stack in outcome.failed.first.trace
    assert outcome.failed.first.trace in str(outcome.failed)


# P25
def test_a_rank_that_lies_about_its_splits_is_named_before_the_bound(tmp_path):
    outcome = run_with(tmp_path, phase="combine", action="lie", amount=2, layer=SECOND)
    assert isinstance(outcome.error, WrongSplits)
    assert outcome.failed.first.rank == VICTIM == outcome.error.rank
    assert (outcome.error.step, outcome.error.phase, outcome.error.layer) == (3, "combine", SECOND)
    assert outcome.delay_s < BOUND_S + LATE_S + BUSY_S


def test_a_rank_that_dies_is_named_with_the_place_of_the_others(tmp_path):
    outcome = run_with(tmp_path, phase="experts", action="kill", layer=SECOND)
    first = outcome.failed.first
    assert (first.rank, first.kind) == (VICTIM, "died")
    assert "rank 0 in step 3, combine of layers.2.moe" in first.message


def test_the_watch_does_not_need_the_time_out_of_the_backend_and_a_slow_rank_is_not_a_dead_one():
    # As on NCCL, whose own time-out comes later: the groups' is 60 s.
    with Gang.launch(replace(CONFIG, collective_timeout_s=60.0), WaitingWorker) as gang:

        def run(sleep_s: float) -> list[Any]:
            calls = [member.actor.call.remote("meet", sleep_s) for member in gang._members]
            return call_all(gang._members, "meet", calls, bound_s=BOUND_S)

        assert run(BOUND_S - 2) == [2, 2]
        began = time.monotonic()
        with pytest.raises(GangFailed) as caught:
            run(60)
        assert time.monotonic() - began < BOUND_S + LATE_S + BUSY_S
    assert caught.value.first.error.missing_ranks == (1,) == (caught.value.first.rank,)
    assert [(f.rank, f.kind) for f in caught.value.failures] == [(1, "hung"), (0, "running")]


def test_the_stack_of_a_process_that_holds_the_gil_is_read_from_its_node():
    with Gang.launch(replace(CONFIG, num_workers=1), DummyWorker) as gang:
        [member] = gang._members
        member.actor.call.remote("hold_the_gil")
        give_up = time.monotonic() + 60
        stack = ""
        while "hold_the_gil" not in stack and time.monotonic() < give_up:
            stack = stacks_of([member], silent=(), timeout_s=1.0)[0]
        assert "hold_the_gil" in stack and "dummy_worker.py" in stack
