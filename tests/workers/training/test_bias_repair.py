"""A live bias that something else wrote to: named by the next checksum, then the run stops, or goes on as if never."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dispatch.laws import LawState
from runtime.job.coordinator import CoordinatorPolicy
from tests.ranks import run_ranks
from tests.workers.control.control_ranks import LiveBias, load_of, one_step, plain_law
from tests.workers.training_gang import assert_same_state, join_worker, make_spec, whole_state
from workers.control.errors import BiasDiverged
from workers.record.run_log import read_events, read_load_history, read_metrics

DAMAGED_BEFORE = {3: (1, 2), 5: (0,), 6: (0, 1, 2)}  # by step, the ranks


def _damage_and_repair(rank: int, world_size: int, skipped: tuple[int, ...]) -> dict[str, Any]:
    model, events, checksums = LiveBias(), [], []
    where = model.bias_N.data_ptr()
    with model.loop(CoordinatorPolicy().handle, on_bias_mismatch="repair") as loop:
        for step in range(9):
            if rank in DAMAGED_BEFORE.get(step, ()):
                model.bias_N[step % 4] = float("nan") if rank == 2 else 7.0
            control = one_step(loop, step, rank, apply=step not in skipped)
            assert model.bias_N.equal(loop.state()[1].bias_N) and model.bias_N.data_ptr() == where
            assert control.load_N.equal(sum(load_of(step, each) for each in range(world_size)))  # as it was routed
            events += control.events
            checksums.append(control.bias_checksum)
    return {"bias": model.bias_N, "version": loop.state()[0], "events": events, "checksums": checksums}


@pytest.mark.parametrize("skipped", [(), (4, 5)])  # the optimizer may skip the very step
def test_repair_goes_on_from_the_law_and_names_ranks_and_step(skipped: tuple[int, ...]) -> None:  # P13
    by_rank = run_ranks(3, _damage_and_repair, skipped)
    # Other loads than those that the bias would have brought move nothing.
    not_applied = tuple({*DAMAGED_BEFORE, *skipped})
    for rank, result in enumerate(by_rank):
        assert result["bias"].equal(plain_law(9, 3, not_applied).bias_N)
        assert result["version"] == 9 - len(not_applied)
        for step, checksum in enumerate(result["checksums"]):
            # What a rank says of itself is what it routed by.
            others = next(each for each in range(4) if each not in DAMAGED_BEFORE.get(step, ()))
            damaged = rank in DAMAGED_BEFORE.get(step, ())
            assert others == 3 or (checksum != by_rank[others]["checksums"][step]) == damaged
    repairs = [{"event": "bias_repaired", "step": step, "ranks": list(ranks)} for step, ranks in DAMAGED_BEFORE.items()]
    assert [result["events"] for result in by_rank] == [repairs, [], []]


def _two_law_states(rank: int, world_size: int) -> Exception | None:
    model = LiveBias()
    with model.loop(on_bias_mismatch="repair") as loop:
        one_step(loop, 0, rank)
        if rank == 1:
            bias_N = model.bias_N + 1e-7
            model.bias_N.copy_(bias_N)
            loop.restore(1, LawState(bias_N))
        try:
            one_step(loop, 1, rank)
        except BiasDiverged as error:
            return error
    return None


def test_ranks_whose_law_states_differ_stop_also_where_a_bias_would_be_repaired() -> None:  # P13
    for error in run_ranks(3, _two_law_states):
        assert isinstance(error, BiasDiverged) and error.ranks == (1,) and "different law states" in str(error)


STEP = 3  # the one that is damaged
SHIFT_E = torch.tensor([9.0, 0, 0, 0, 9.0, 0, 0, 0])  # every token goes to experts 0 and 4


def _train(rank: int, world_size: int, spec: Any, damage: bool = True) -> tuple[Any, list[dict[str, Any]]]:
    """Damages what routes the second half of the batch in STEP: rank 1, or of one rank the second micro-batch."""
    worker = join_worker(spec, rank, world_size, f"{spec.run_dir.name}-{world_size}", float64=True)
    forwards = [0]

    def before_forward(*_: Any) -> None:
        step, micro = divmod(forwards[0], 2 // world_size)
        forwards[0] += 1
        if damage and step + 1 == STEP and max(rank, micro) == 1:
            for router in worker._state.routers.values():
                router.expert_bias_E += SHIFT_E.to(router.expert_bias_E)

    worker._state.model.register_forward_pre_hook(before_forward)
    worker.train()
    return whole_state(worker), worker.progress(0)


def test_a_repaired_run_loses_no_token_and_its_gradients_are_those_of_its_routing(tmp_path: Any) -> None:  # P13, P17
    spec = make_spec(tmp_path, steps=6, on_bias_mismatch="repair", micro_batch_size=6)
    names = {1: "one", 2: "two"}
    states = {}
    for world_size, name in names.items():
        states[world_size] = run_ranks(world_size, _train, replace(spec, run_dir=tmp_path / name))[0][0]
    train, _ = read_metrics(tmp_path / "two")
    expected = 12 * 16 * 2 * 2  # sequences x tokens x top_k x MoE layers
    for line in train:
        assert {line[f"tokens_{what}"] for what in ("routed", "sent", "received", "returned")} == {expected}
    (repair,) = [event for event in read_events(tmp_path / "two") if event["event"] == "bias_repaired"]
    assert (repair["step"], repair["ranks"]) == (STEP, [1])
    # The load is what was really routed: half of the batch to two experts, and this moved no bias.
    history = read_load_history(tmp_path / "two")
    assert history.counts[STEP - 1][[0, 4]].min() > expected / 8
    assert [line["bias_version"] for line in train] == [0, 1, 2, 2, 3, 4]
    assert history.bias[STEP - 1].tobytes() == history.bias[STEP].tobytes() != history.bias[STEP + 1].tobytes()
    # One rank with two micro-batches, the second routed by the same wrong bias, trains the same weights.
    assert_same_state(states[2], states[1], "two ranks")


def _train_until_it_stops(rank: int, world_size: int, spec: Any) -> Exception | None:
    try:
        _train(rank, world_size, spec)
    except BiasDiverged as error:
        return error
    return None


def test_by_default_a_damaged_bias_ends_the_training_on_all_ranks(tmp_path: Any) -> None:  # P13
    for error in run_ranks(2, _train_until_it_stops, make_spec(tmp_path, steps=6)):
        assert isinstance(error, BiasDiverged) and (error.step, error.ranks) == (STEP, (1,))
        assert "the live bias of ranks [1] is not version 2" in str(error)
