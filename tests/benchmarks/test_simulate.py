"""The clock of the measured steps, and the published figures; the steps are `python -m benchmarks.simulate`."""

import time
from types import SimpleNamespace

import pytest

from benchmarks.simulate.barrier_clock import critical_path, stretches
from benchmarks.simulate.cases import MODELS, cases_of
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


def test_simulated_figures_are_of_the_published_size() -> None:
    found = {(figure.name, figure.taken): figure.of_step(figure.simulate()) / figure.published for figure in FIGURES}
    assert all(0.6 < ratio < 1.5 for ratio in found.values())
    # DeepSeek-V3 lies between all exchanges hidden and none.
    hours = [ratio for (name, _), ratio in list(found.items())[:4]]
    assert hours[0] < 1 < hours[3]
