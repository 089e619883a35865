"""A rank that hangs, leaves something out or lies, in a real run on a real local Ray: who is named, and how soon."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import ClusterConfig
from cluster.failures import GangFailed
from cluster.gang import Gang
from dispatch.collective_errors import CollectiveTimeout, RanksDiverged, WrongSplits
from runtime.launch import worker_maker
from tests.workers.training_gang import make_spec
from workers.faults import Fault
from workers.parallel import ParallelConfig

pytestmark = pytest.mark.usefixtures("ray_session")

BOUND_S = 4.0
LATE_S = 5.0  # the promise: the error comes at most this much after the bound
BUSY_S = 5.0  # what a machine may take that runs other tests beside it
CONFIG = ClusterConfig(
    num_workers=4, device="cpu", threads_per_worker=1, start_timeout_s=90.0, collective_timeout_s=BOUND_S
)
# Two expert-parallel groups of two ranks, {0, 1} and {2, 3}; of three layers the last two are MoE.
FIRST, SECOND = "layers.1.moe", "layers.2.moe"
VICTIM = 1


@dataclass(frozen=True)
class Outcome:
    failed: GangFailed
    delay_s: float  # from the fault to the error

    @property
    def error(self) -> Any:
        return self.failed.first.error


def run_with(folder: Path, **fault: Any) -> Outcome:
    spec = replace(
        make_spec(folder, steps=30, global_batch_size=8, eval_every=0),
        faults=(Fault(rank=VICTIM, step=3, **fault),),
        control_timeout_s=BOUND_S,
        parallel=ParallelConfig(ep_size=2),
    )
    spec.run_dir.mkdir()
    with Gang.launch(CONFIG, worker_maker(spec)) as gang, pytest.raises(GangFailed) as caught:
        gang.run("train")
    ended = time.time()
    fired = (spec.run_dir / "faults/0.fired").stat().st_mtime
    print(f"\n--- {fault} {ended - fired:.1f} s\n{caught.value}")
    processes = [psutil.Process(row.pid) for row in gang.rank_map if psutil.pid_exists(row.pid)]
    assert not psutil.wait_procs(processes, timeout=10)[1]
    return Outcome(caught.value, ended - fired)


@pytest.mark.parametrize(
    ("fault", "where", "doing"),
    [
        (
            {"phase": "dispatch", "action": "sleep", "amount": 60, "layer": SECOND},
            ("dispatch", SECOND),
            "in step 3, dis",
        ),
        (
            {"phase": "experts", "action": "sleep", "amount": 60},
            ("combine", FIRST),
            "in step 3, experts of layers.1.moe",
        ),
        (
            {"phase": "backward dispatch", "action": "sleep", "amount": 60, "layer": FIRST},
            ("backward dispatch", FIRST),
            "in step 3, backward dispatch of layers.1.moe for",
        ),
        ({"phase": "backward", "action": "stop"}, ("backward combine", SECOND), "does not answer: it is stopped"),
        ({"phase": "gradients", "action": "skip"}, ("gradients", ""), "left out step 3, gradients"),
        ({"phase": "bias update", "action": "skip"}, ("bias update, reduce", ""), "left out step 3, bias update"),
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
    assert (outcome.error.step, outcome.error.phase, outcome.error.layer) == (3, *where)
    assert doing in outcome.error.details
    assert outcome.delay_s < BOUND_S + LATE_S + BUSY_S


@pytest.mark.parametrize(
    ("fault", "kind", "where"),
    [
        ({"phase": "dispatch", "action": "skip", "layer": FIRST}, RanksDiverged, (3, "dispatch", FIRST)),
        ({"phase": "step", "action": "skip"}, RanksDiverged, (3, "dispatch", FIRST)),
        ({"phase": "combine", "action": "lie", "amount": 2, "layer": SECOND}, WrongSplits, (3, "combine", SECOND)),
        ({"phase": "backward dispatch", "action": "lie", "amount": -2}, WrongSplits, (3, "backward dispatch", SECOND)),
    ],
    ids=["skips a layer", "skips a step", "sends too many rows", "sends too few rows"],
)
def test_a_rank_that_leaves_something_out_or_lies_is_named_before_the_bound(tmp_path, fault, kind, where):
    outcome = run_with(tmp_path, **fault)
    assert isinstance(outcome.error, kind)
    assert outcome.failed.first.rank == VICTIM
    assert getattr(outcome.error, "ranks", (VICTIM,)) == (VICTIM,)
    assert (outcome.error.step, outcome.error.phase, outcome.error.layer) == where
    assert outcome.delay_s < BOUND_S + LATE_S + BUSY_S


def test_a_rank_that_dies_is_named_with_the_place_of_the_others(tmp_path):
    outcome = run_with(tmp_path, phase="experts", action="kill", layer=SECOND)
    first = outcome.failed.first
    assert (first.rank, first.kind) == (VICTIM, "died")
    assert "rank 0 in step 3, combine of layers.2.moe" in first.message
