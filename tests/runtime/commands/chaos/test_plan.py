"""Plans of faults: pure, seeded, complete, with room for every recovery."""

from dataclasses import replace
from itertools import pairwise

import pytest

from runtime.commands.chaos.kinds import KILLED_IN, KINDS
from runtime.commands.chaos.plan import (
    CHECKPOINT_EVERY,
    PRESETS,
    UNIT,
    fired_mark,
    go_mark,
    make_plan,
    num_steps,
    worker_faults,
)
from workers.training.fault_plan import Fault

FULL = PRESETS["full"]


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_comes_before_any_comes_again_and_the_seed_decides_the_order(seed):
    plan = make_plan(FULL, seed)
    names = [fault.kind.name for fault in plan]
    assert len(plan) == FULL.num_faults == len(KINDS) and set(names) == set(KINDS)
    more = [fault.kind.name for fault in make_plan(replace(FULL, num_faults=len(KINDS) + 5), seed)]
    assert more[: len(KINDS)] == names and len(set(more[len(KINDS) :])) == 5
    assert plan == make_plan(FULL, seed)
    assert names != [fault.kind.name for fault in make_plan(FULL, seed + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_there_is_a_checkpoint_and_room_between_two_faults(seed):
    plan = make_plan(FULL, seed)
    assert plan[0].step >= 2 * CHECKPOINT_EVERY  # a damaged checkpoint needs one before it
    for fault, following in pairwise(plan):
        assert following.step - fault.step >= fault.kind.room * UNIT - CHECKPOINT_EVERY > CHECKPOINT_EVERY
    assert num_steps(plan) >= plan[-1].step + 2 * CHECKPOINT_EVERY


def test_who_is_struck_exists_and_a_machine_that_is_struck_is_not_the_head():
    for seed in range(20):
        for fault in make_plan(replace(FULL, num_machines=3), seed):
            assert 0 <= fault.machine < 3 and fault.rank // FULL.workers_per_machine == fault.machine
            assert fault.machine > 0 or not fault.kind.strikes_node


def test_workers_are_held_before_every_fault_and_then_do_the_planned_ones_to_themselves():
    plan = make_plan(FULL, 0)
    faults = [Fault(**each) for each in worker_faults(plan)]  # which checks phases and actions
    holds, planned = faults[: len(plan)], faults[len(plan) :]
    assert all(fault.step - UNIT < hold.step < fault.step for hold, fault in zip(holds, plan, strict=True))
    assert {fault.phase for fault in planned if fault.action == "kill"} == set(KILLED_IN)
    by_mark = {f"faults/{number}.fired": fault for number, fault in enumerate(faults)}
    for fault in plan:
        if fault.kind.is_planned:
            found = by_mark[fired_mark(plan, fault)]
            assert (found.rank, found.step, found.phase) == (fault.rank, fault.step, fault.kind.phase)
            assert found.phase != "checkpoint write" or found.step % CHECKPOINT_EVERY == 0
    assert go_mark(plan[3]) == "faults/3.go"


def test_sizes_that_no_plan_can_have_are_refused():
    with pytest.raises(ValueError, match=r"num_machines \(1\) must be at least 2"):
        replace(FULL, num_machines=1)
    with pytest.raises(ValueError, match="'earthquake' is no kind of fault; there are kill in forward"):
        replace(FULL, kinds=("earthquake",))
    with pytest.raises(ValueError, match=r"num_faults \(0\)"):
        replace(FULL, num_faults=0)
