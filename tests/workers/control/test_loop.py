"""The control loop on 2 and 3 gloo ranks: exact sums, and one bias everywhere whatever the coordinator does."""

import threading
import time
from typing import Any

import pytest
import torch

from dispatch.balance import bias_checksum
from dispatch.laws import BalanceConfig, LawState
from dispatch.layout import LoadLayout
from runtime.job.coordinator import CoordinatorPolicy
from tests.ranks import run_ranks
from tests.workers.control.control_ranks import (
    CONFIG,
    LAYOUT,
    NO_FLOATS,
    NO_LOAD,
    NO_SUMS,
    LiveBias,
    load_of,
    one_step,
    plain_law,
)
from workers.control.loop import StepControl


def _report_everything(rank: int, world_size: int) -> list[StepControl]:
    model = LiveBias()
    with model.loop(CoordinatorPolicy().handle) as loop:
        steps = []
        for step in range(3):
            load_N, sums = load_of(step, rank), torch.tensor([rank + 1, 10**15])
            floats, maxima = torch.tensor([0.5 * rank, float("nan")], dtype=torch.float64), torch.tensor([-5 - rank])
            loop.begin_step(step, load_N, sums, floats, maxima, stop_requested=step == 1 and rank == 1)
            # B7: the caller's own numbers stay; and what it does with them afterwards does not matter.
            assert load_N.equal(load_of(step, rank)) and sums.tolist() == [rank + 1, 10**15]
            for mine in (load_N, sums, floats, maxima):
                mine.zero_()
            steps.append(loop.finish_step(apply=True))
    assert not any(thread.name == "control" for thread in threading.enumerate())
    return steps


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_exact_sums_of_all_ranks(world_size: int) -> None:  # B7, P9
    by_rank = run_ranks(world_size, _report_everything)
    for steps in by_rank:
        for step, control in enumerate(steps):
            assert control.step == step
            assert control.load_N.equal(sum((load_of(step, rank) for rank in range(world_size)), NO_LOAD))
            assert control.sums.tolist() == [sum(range(1, world_size + 1)), world_size * 10**15]
            assert control.floats[0] == 0.5 * sum(range(world_size)) and control.floats[1].isnan()
            assert control.maxima.tolist() == [-5]
            assert control.stop == (step == 1)  # one rank asked, all stop
            # what routed the step: version s, the state after s updates
            used = plain_law(step, world_size).bias_N
            assert control.bias_version == step and control.bias_N.equal(used)
            assert control.bias_checksum == bias_checksum(used)
            assert control.wait_s >= 0 and control.bias_update_s > 0


def _train(
    rank: int, world_size: int, num_steps: int, config: BalanceConfig, dead: tuple[int, ...], skipped: tuple[int, ...]
) -> tuple[torch.Tensor, int, list[str]]:
    """A coordinator that is dead at these calls, and forgets all each time it dies."""
    policy, calls = [CoordinatorPolicy()], [0]

    def coordinator(raw: bytes) -> bytes:
        assert rank == 0, "only rank 0 may talk to the coordinator"
        calls[0] += 1
        if calls[0] - 1 in dead:
            policy[0] = CoordinatorPolicy()
            raise ConnectionError("killed")
        return policy[0].handle(raw)

    model, events = LiveBias(), []
    where = model.bias_N.data_ptr()
    with model.loop(coordinator, config=config) as loop:
        for step in range(num_steps):
            control = one_step(loop, step, rank, apply=step not in skipped)
            assert control.load_N.equal(sum((load_of(step, each) for each in range(world_size)), NO_LOAD))
            events += control.events
        version = loop.state()[0]
    assert model.bias_N.data_ptr() == where  # B24: in place
    return model.bias_N, version, [event["event"] for event in events]


@pytest.mark.parametrize(
    ("dead", "skipped", "events"),
    [
        ((), (), []),
        ((3, 4), (), ["coordinator_lost", "coordinator_back"]),
        (tuple(range(40)), (), ["coordinator_lost"]),
        ((), (2, 3, 11), []),  # B37
        ((2,), (2, 4), ["coordinator_lost", "coordinator_back"]),
    ],
)
def test_a_killed_coordinator_changes_no_bit_and_loses_no_step(  # P13, P16, B9, B37
    dead: tuple[int, ...], skipped: tuple[int, ...], events: list[str]
) -> None:
    by_rank = run_ranks(3, _train, 20, CONFIG, dead, skipped)
    expected = plain_law(20, 3, skipped).bias_N
    assert expected[:6].abs().min() > 0 and not expected[6:].any()  # B10: the layer that is off stays off
    for bias_N, version, _ in by_rank:
        assert bias_N.equal(expected) and version == 20 - len(skipped)
    assert [news for _, _, news in by_rank] == [events, [], []]


def test_law_none_reports_loads_and_leaves_the_bias_alone() -> None:  # B11
    for bias_N, version, _ in run_ranks(2, _train, 3, BalanceConfig(law="none"), (), ()):
        assert not bias_N.any() and version == 3


def _permuted(rank: int, world_size: int, shift: int) -> torch.Tensor:
    model = LiveBias()
    with model.loop() as loop:
        for step in range(5):
            one_step(loop, step, (rank + shift) % world_size)
    return model.bias_N


def test_the_order_of_the_ranks_does_not_move_a_bit() -> None:  # B1
    results = [bias_N for shift in range(3) for bias_N in run_ranks(3, _permuted, shift)]
    assert all(bias_N.equal(plain_law(5, 3).bias_N) for bias_N in results)


def _resume(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    policy = CoordinatorPolicy()
    model = LiveBias()
    with model.loop(policy.handle) as loop:
        for step in range(4):
            one_step(loop, step, rank)
        version, state = loop.state()
        saved = model.bias_N.clone()
        loop.state()[1].bias_N.fill_(9.0)  # a checkpoint is loaded in place: that must not reach the live state
        for step in range(4, 8):
            one_step(loop, step, rank)
    assert state.bias_N.equal(saved)  # a copy: later steps do not reach into the checkpoint
    resumed = LiveBias()
    resumed.bias_N.copy_(saved)
    with resumed.loop(policy.handle) as loop:
        loop.restore(version, state)
        for step in range(4, 8):
            control = one_step(loop, step, rank)
    assert control.bias_version == 7
    return model.bias_N, resumed.bias_N


def test_a_restored_loop_goes_on_bit_for_bit() -> None:  # B26
    for straight, resumed in run_ranks(2, _resume):
        assert straight.equal(resumed) and straight.equal(plain_law(8, 2).bias_N)


def _misuse(rank: int, world_size: int) -> None:
    model = LiveBias()
    loop = model.loop()
    with pytest.raises(RuntimeError, match="without begin_step"):
        loop.finish_step(apply=True)
    for name, at in (("counts_M", 0), ("sums", 1), ("floats", 2), ("maxima", 3)):
        vectors = [NO_LOAD, NO_SUMS, NO_FLOATS, NO_SUMS]
        for wrong in (vectors[at].float(), vectors[at].new_zeros(()), vectors[at].new_zeros(2, 2)):
            vectors[at] = wrong
            with pytest.raises(ValueError, match=name):
                loop.begin_step(0, *vectors)
    with pytest.raises(ValueError, match="counts_M"):
        loop.begin_step(0, NO_LOAD[1:], NO_SUMS, NO_FLOATS, NO_SUMS)
    loop.begin_step(0, NO_LOAD, NO_SUMS, NO_FLOATS, NO_SUMS)
    with pytest.raises(RuntimeError, match="before finish_step"):
        loop.begin_step(1, NO_LOAD, NO_SUMS, NO_FLOATS, NO_SUMS)
    loop.finish_step(apply=True)
    with pytest.raises(ValueError, match="does not fit this run's law"):
        loop.restore(3, LawState(torch.zeros(LAYOUT.total), {"momentum": torch.zeros(2)}))
    with pytest.raises(ValueError, match="load both from one checkpoint"):
        loop.restore(3, LawState(torch.ones(LAYOUT.total)))
    loop.close()
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.begin_step(1, NO_LOAD, NO_SUMS, NO_FLOATS, NO_SUMS)
    model.bias_N[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.loop()


def test_misuse_is_an_error_and_leaves_the_loop_usable() -> None:
    run_ranks(2, _misuse)


def _without_moe_layers(rank: int, world_size: int) -> list[int]:
    nothing = LoadLayout((), (), ())
    with LiveBias(nothing).loop(CoordinatorPolicy().handle, layout=nothing) as loop:
        loop.begin_step(0, NO_SUMS, torch.tensor([rank]), NO_FLOATS, NO_SUMS)
        return loop.finish_step(apply=True).sums.tolist()


def test_a_model_without_moe_layers_still_gets_its_sums() -> None:  # B8
    assert run_ranks(2, _without_moe_layers) == [[1], [1]]


def _pace(rank: int, world_size: int, num_steps: int, backward_s: float) -> tuple[list[float], float, float]:
    """Waits, and CPU seconds of the control a step: those of the training thread and those of the control thread."""
    layout = LoadLayout(("a", "b", "c"), (16, 16, 16), (True, True, True))
    model = LiveBias(layout)
    loop = model.loop(CoordinatorPolicy().handle, layout=layout)
    inner, thread_cpu = loop._round.run, [0.0]

    def timed(given: Any) -> Any:
        began = time.thread_time()
        try:
            return inner(given)
        finally:
            thread_cpu[0] += time.thread_time() - began

    loop._round.run = timed  # type: ignore[method-assign]
    load_N, sums, floats, maxima = (
        torch.arange(48),
        torch.ones(12, dtype=torch.int64),
        torch.ones(4).double(),
        torch.arange(8),
    )
    waits, main_cpu = [], 0.0
    for step in range(num_steps):
        began = time.thread_time()
        loop.begin_step(step, load_N, sums, floats, maxima)
        main_cpu += time.thread_time() - began
        time.sleep(backward_s)
        began = time.thread_time()
        waits.append(loop.finish_step(apply=True).wait_s)
        main_cpu += time.thread_time() - began
    loop.close()
    return waits, main_cpu / num_steps, thread_cpu[0] / num_steps


def test_the_control_hides_behind_the_backward_and_costs_little() -> None:
    backward_s = 0.05
    for waits, main_cpu_s, thread_cpu_s in run_ranks(2, _pace, 20, backward_s):
        # With four busy processes a core: median wait 0.03 ms; CPU 1 to 2 ms, 5 on a slow machine. A control that polls
        # instead of waiting takes all of the backward.
        assert sorted(waits)[len(waits) // 2] < 0.01
        assert main_cpu_s + thread_cpu_s < backward_s / 2
