"""Fault plans, and what ranks notice of a fault by themselves, without Ray."""

import json
import pickle
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dispatch.diagnosis.activity_tracker import ActivityTracker
from dispatch.diagnosis.collective_errors import CollectiveTimeout, RanksDiverged, WrongSplits
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.training.fault_plan import Fault, planned_faults
from workers.training.faults import FaultPlan, PlannedFault, act_at_phases

FIRST, SECOND = "layers.1.moe", "layers.2.moe"


def _train(rank, world_size, spec, timeout_s=20.0):
    worker = join_worker(spec, rank, world_size, "fault", timeout_s=timeout_s)
    try:
        worker.train()
    except Exception as error:  # noqa: BLE001 - what it is is the question
        worker.leave()
        assert worker.activity()["training"].step >= spec.faults[0].step  # its last words, when it has left its groups
        return pickle.loads(pickle.dumps(error))
    return None


def errors_of(folder, world_size, **fault):
    spec = replace(make_spec(folder, steps=5), faults=(Fault(rank=1, **fault),))
    return run_ranks(world_size, _train, spec)


@pytest.mark.parametrize(
    ("fault", "step", "layer", "places"),
    [
        ({"step": 2, "phase": "dispatch", "layer": FIRST}, 2, FIRST, f"rank 1 at step 2, dispatch of {SECOND}"),
        ({"step": 3, "phase": "step"}, 3, FIRST, f"rank 1 at step 4, dispatch of {FIRST}"),
    ],
    ids=["a layer", "a step"],
)
def test_a_rank_that_left_something_out_is_named_on_every_rank(tmp_path, fault, step, layer, places):
    for error in errors_of(tmp_path, 3, action="skip", **fault):
        assert isinstance(error, RanksDiverged)
        assert (error.ranks, error.step, error.layer, error.phase) == ((1,), step, layer, "dispatch")
        assert places in str(error)
        assert "rank 1 left something out: ranks 0, 2 at" in str(error)


@pytest.mark.parametrize("amount", [1, -1], ids=["too many", "too few"])
def test_a_rank_is_stopped_before_it_sends_other_splits_than_announced(tmp_path, amount):
    error = errors_of(tmp_path, 2, action="lie", step=2, phase="backward combine", layer=FIRST, amount=amount)[1]
    assert isinstance(error, WrongSplits)
    assert (error.rank, error.step, error.layer, error.phase) == (1, 2, FIRST, "backward combine")
    assert error.sent[0] - error.announced[0] == amount


def test_without_a_driver_the_rank_itself_says_what_it_waited_in(tmp_path):
    spec = replace(
        make_spec(tmp_path, steps=5),
        faults=(Fault(rank=1, step=2, phase="experts", action="sleep", amount=4, layer=SECOND),),
    )
    error = run_ranks(2, _train, spec, 2.0)[0]
    assert isinstance(error, CollectiveTimeout)
    assert (error.step, error.layer, error.phase, error.missing_ranks) == (2, SECOND, "combine", None)
    assert 1.9 < error.waited_s < 4


def watched(plan: tuple[Fault, ...], run_dir: Path) -> ActivityTracker:
    tracker = ActivityTracker()
    act_at_phases(FaultPlan(plan, 0, run_dir), tracker)
    return tracker


def at(tracker: ActivityTracker, step: int, phase: str, layer: str = "") -> None:
    tracker.step, tracker.layer = step, layer
    tracker.set_phase(phase)


def test_a_rank_is_held_until_it_may_go_on_or_for_some_time(tmp_path):
    plan = tuple(
        Fault(rank=0, step=step, phase="forward", action="hold", amount=amount)
        for step, amount in ((1, 0.3), (2, 100.0))
    )
    tracker = watched(plan, tmp_path)
    begun = time.monotonic()
    at(tracker, 1, "forward")
    assert time.monotonic() - begun >= 0.3
    (tmp_path / "faults" / "1.go").touch()
    begun = time.monotonic()
    at(tracker, 2, "forward")
    assert time.monotonic() - begun < 50
    with pytest.raises(ValueError, match=r"amount \(0\) must be seconds above 0 for sleep and hold"):
        Fault(rank=0, step=1, phase="forward", action="hold")


def test_a_fault_fires_in_its_place_and_only_once_in_the_life_of_a_run(tmp_path):
    plan = (
        Fault(rank=0, step=2, phase="experts", layer=SECOND, action="raise"),
        Fault(rank=1, step=1, phase="forward", action="raise"),
    )
    tracker = watched(plan, tmp_path)
    at(tracker, 1, "forward")
    at(tracker, 2, "experts", FIRST)
    at(tracker, 2, "dispatch", SECOND)
    with pytest.raises(PlannedFault, match="rank 0 was to fail in step 2, experts"):
        at(tracker, 2, "experts", SECOND)
    at(tracker, 2, "experts", SECOND)
    at(watched(plan, tmp_path), 2, "experts", SECOND)  # the process after it
    assert [path.name for path in (tmp_path / "faults").iterdir()] == ["0.fired"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"action": "explode"}, "action .'explode'. must be one of kill, stop"),
        ({"phase": "lunch"}, "phase .'lunch'. must be, for the action kill, one of forward, dispatch"),
        ({"action": "skip", "phase": "experts"}, "for the action skip, one of step, dispatch, gradients"),
        ({"action": "sleep"}, "amount .0. must be seconds above 0"),
        ({"rank": -1}, "rank .-1. and step .1. must be 0 or more"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Fault(**({"rank": 0, "step": 1, "phase": "forward", "action": "kill"} | wrong))


def test_a_plan_comes_from_the_file_that_the_environment_names(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps([{"rank": 1, "step": 20, "phase": "experts", "action": "kill"}]))
    assert planned_faults({}) == ()
    assert planned_faults({"TRIMTAB_FAULTS": str(path)}) == (Fault(rank=1, step=20, phase="experts", action="kill"),)
    path.write_text('[{"rank": 1, "when": 20}]')
    with pytest.raises(ValueError, match=r"TRIMTAB_FAULTS .* is no plan of faults: .*when"):
        planned_faults({"TRIMTAB_FAULTS": str(path)})
