"""Loads of a given MaxVio, and how many more rows than planned the ranks get."""

import numpy as np
import pytest

from dispatch.errors import InvalidValue
from runtime.commands.plan.simulate.routing import balanced, factors_of_load, log_normal_load, skewed


@pytest.mark.parametrize("max_vio", [0.0, 0.1, 1.0, 4.0, 30.0])
def test_a_load_has_the_max_vio_that_was_asked_for_and_mean_one(max_vio: float) -> None:
    load = log_normal_load(max_vio, 64)
    assert load.mean() == pytest.approx(1)
    assert load.max() / load.mean() - 1 == pytest.approx(max_vio, abs=1e-6)


def test_factors_are_the_sums_of_neighbouring_experts() -> None:
    # 5 experts on 2 ranks: 0 1 2 | 3 4. Balanced, the first would get 3 of 5 shares: that is what is planned.
    load = np.array([[10.0, 0, 5, 20, 15], [1, 1, 1, 1, 1]])
    expected = []
    for row in load:
        mean = sum(row) / 5
        expected.append([sum(row[:3]) / mean / 3, sum(row[3:]) / mean / 3])
    assert factors_of_load(load, (3, 2)) == pytest.approx(np.array(expected))
    assert balanced(1, (3, 2)) == pytest.approx(np.array([[1, 2 / 3]]))


def test_a_layer_without_load_counts_as_balanced() -> None:
    assert factors_of_load(np.zeros((1, 4)), (2, 2)) == pytest.approx(np.ones((1, 2)))


def test_one_expert_a_rank_bears_all_of_max_vio_and_one_rank_none() -> None:
    assert skewed([2.0] * 3, 16, 2, [1] * 16).max(1) == pytest.approx([3.0] * 3)
    assert skewed([2.0] * 3, 16, 2, [16]) == pytest.approx(np.ones((3, 1)))


def test_layers_have_their_hot_experts_in_different_places() -> None:
    hottest = skewed([4.0] * 8, 64, 4, [1] * 64).argmax(1)
    assert len(set(hottest.tolist())) > 4


def test_more_than_every_token_for_one_expert_is_refused() -> None:
    skewed([3.0], 16, 4, [4] * 4)
    with pytest.raises(InvalidValue, match=r"--max-vio 3\.1 must be between 0 and 3: of 16 experts, with top-4"):
        skewed([3.1], 16, 4, [4] * 4)
