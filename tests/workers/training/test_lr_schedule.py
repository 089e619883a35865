"""The learning rate: warm-up, cosine, and schedules of few steps."""

import pytest

from workers.training.lr_schedule import learning_rate
from workers.training.optimizer import OptimConfig


def test_learning_rate_warms_up_linearly_then_follows_a_cosine_to_its_floor() -> None:
    config = OptimConfig(lr=1.0, min_lr_ratio=0.2, warmup_steps=4)
    rates = [learning_rate(step, 13, config) for step in range(13)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    # 8 steps of decay after step 4: half way at step 8, a quarter of the cosine at step 6
    assert rates[4] == pytest.approx(1.0)
    assert rates[6] == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert rates[8] == pytest.approx(0.6)
    assert rates[12] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("total_steps", "warmup_steps", "last"), [(1, 0, 1.0), (2, 0, 0.5), (3, 5, 0.6), (5, 5, 1.0)])
def test_very_short_schedules_stay_between_zero_and_the_peak(total_steps: int, warmup_steps: int, last: float) -> None:
    config = OptimConfig(lr=1.0, min_lr_ratio=0.5, warmup_steps=warmup_steps)
    rates = [learning_rate(step, total_steps, config) for step in range(total_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] == pytest.approx(last)


def test_steps_past_the_end_keep_the_floor() -> None:
    assert learning_rate(100, 10, OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=2)) == pytest.approx(0.1)
