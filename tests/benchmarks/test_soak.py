"""Growth as the soak tells it, and the law that makes ragged loads. The run itself is `python -m benchmarks.soak`."""

import math

import pytest
import torch

from benchmarks.soak.memory import MIN_STEPS, Track
from dispatch.laws import LAWS, LayerLoad, LayerState


def test_growth_is_told_per_thousand_steps_and_without_the_warm_up() -> None:
    steps = list(range(0, 8 * MIN_STEPS, 100))
    start = len(steps) * 3 // 4
    leaks = [100.0 + (0 if index < start else 0.003 * (step - steps[start])) for index, step in enumerate(steps)]
    track = Track("worker", steps, leaks, [7] * len(steps))
    assert track.slope(track.mib) == pytest.approx(3.0)
    assert track.slope(track.files) == pytest.approx(0.0, abs=1e-9)
    warms_up = Track("worker", steps, [float(min(index, start)) for index in range(len(steps))], [])
    assert warms_up.slope(warms_up.mib) == pytest.approx(0.0, abs=1e-9)


def test_a_short_life_tells_nothing() -> None:
    track = Track("worker", list(range(0, MIN_STEPS, 10)), [1.0] * (MIN_STEPS // 10), [])
    assert math.isnan(track.slope(track.mib))


def test_the_ragged_law_is_pure_and_leaves_experts_without_tokens() -> None:
    from benchmarks.soak.ragged_law import ragged

    LAWS.forget("ragged")  # it is for the soak alone: other tests take every law that is registered
    load = LayerLoad(torch.full((8,), 10), torch.zeros(8, 0, dtype=torch.int64))
    state = LayerState(torch.zeros(8, dtype=torch.float64), {"draws": torch.zeros(1, dtype=torch.float64)})
    spreads = []
    for _ in range(30):
        again, state = ragged(load, state, 1.0), ragged(load, state, 1.0)
        assert torch.equal(again.bias_E, state.bias_E)
        spreads.append(float(state.bias_E.max() - state.bias_E.min()))
    assert min(spreads) == 0 and max(spreads) > 1  # scores lie in [0, 1]: beyond that, bias alone chooses
