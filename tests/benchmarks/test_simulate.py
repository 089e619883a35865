"""The clock of the measured steps, and the published figures; the steps are `python -m benchmarks.simulate`."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks.simulate.barrier_clock import critical_path, stretches
from benchmarks.simulate.cases import MODELS, cases_of
from benchmarks.simulate.deepseek import moved
from benchmarks.simulate.dual_pipe import Chunk, makespan, order
from benchmarks.simulate.public import FIGURES
from dispatch.diagnosis.activity import Collective
from dispatch.diagnosis.activity_tracker import ActivityTracker, PendingCollective


def test_a_step_is_the_sum_of_its_stretches_each_as_long_as_the_slowest_rank() -> None:
    # Rank 0 works 3 s while rank 1 waits, then the other way round.
    assert critical_path([[3.0, 1.0], [1.0, 3.0]], cores=2) == 6
    assert critical_path([[3.0, 1.0], [1.0, 3.0]], cores=1) == 8  # one after the other
    assert critical_path([[1.0]] * 4, cores=2) == 2


def test_ranks_that_wait_differently_often_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        critical_path([[1.0, 1.0], [1.0]], cores=2)


def waited(tracker: ActivityTracker, work_s: float) -> None:
    """A collective during which another process has the core, after so much work."""
    began = time.process_time()
    while time.process_time() - began < work_s:
        pass
    pending = PendingCollective(tracker, Collective.__new__(Collective), 0.0)
    pending.work = SimpleNamespace(wait=lambda: time.sleep(0.05), is_completed=lambda: True)
    pending.wait()


def test_stretches_are_the_work_between_waits_of_one_tracker_without_the_waiting() -> None:
    mine, other = ActivityTracker(), ActivityTracker()
    with stretches(mine) as found:
        waited(mine, 0.02)
        waited(other, 0.03)
        waited(mine, 0.01)
    assert found == pytest.approx([0.02, 0.04, 0.0], abs=0.008)


def test_there_are_twelve_even_cases_and_skewed_ones_besides() -> None:
    cases = [case for ep_size in (1, 2, 4) for case in cases_of(ep_size)]
    assert sum(not case.skewed for case in cases) == 12
    assert sum(case.skewed for case in cases) == 4
    assert {case.twin.model for case in cases} < MODELS.keys()


@pytest.mark.parametrize("num_ranks, num_micro", [(4, 10), (8, 20), (16, 120)])
def test_dual_pipe_waits_as_long_as_its_published_formula_says(num_ranks: int, num_micro: int) -> None:
    # (PP / 2 - 1)(F&B + B - 3 W), in the units of the paper's figure.
    chunk = Chunk(forward=1.0, backward=2.0, weights=1.0, both=3.0)
    assert makespan(chunk, num_ranks, num_micro) == num_micro * 3 + (num_ranks / 2 - 1) * (3 + 2 - 3)


@pytest.mark.parametrize("num_ranks, num_micro", [(4, 10), (8, 20), (16, 120)])
def test_every_rank_computes_every_micro_batch_once_in_each_direction(num_ranks: int, num_micro: int) -> None:
    for rank in range(num_ranks):
        parts = [part for parts in order(rank, num_ranks, num_micro) for part in parts]
        counts = Counter((part.kind, part.way) for part in parts if part.kind != "weights")
        assert set(counts.values()) == {num_micro // 2}
        assert len(counts) == 4
        assert sum(part.late for part in parts) == sum(part.kind == "weights" for part in parts)


def test_exchanges_that_nothing_hides_lengthen_a_pipeline_that_fills_and_drains() -> None:
    hidden = makespan(Chunk(forward=1.0, backward=2.0, weights=1.0, both=3.0), 16, 120)
    slower = makespan(Chunk(forward=2.0, backward=3.0, weights=1.0, both=3.0), 16, 120)
    # 16 to 23 of 120 micro-batches have no partner; each takes 2 longer.
    assert 16 * 2 <= slower - hidden <= 23 * 2


def test_a_pipeline_with_too_few_micro_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 x 16"):
        makespan(Chunk(forward=1.0, backward=2.0, weights=1.0, both=3.0), 16, 24)


def test_simulated_figures_are_of_the_published_size() -> None:
    ratios = [figure.of_step(figure.simulate()) / figure.published for figure in FIGURES]
    assert all(0.6 < ratio < 1.5 for ratio in ratios)
    # DeepSeek-V3: its hours, with an even load and an uneven one, and its profile.
    assert ratios[:3] == pytest.approx([1.0] * 3, abs=0.1)


def test_a_slower_network_costs_deepseek_more_than_a_message_does() -> None:
    spread = {name: slow.step_s - fast.step_s for name, (slow, fast) in moved()}
    assert spread["memory_bytes_per_s"] > spread["network.bytes_per_s"] > abs(spread["network.alpha_s"])
