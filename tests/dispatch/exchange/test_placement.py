import pytest

from dispatch.exchange.placement import ExpertPlacement


def test_experts_lie_in_contiguous_runs_also_when_they_do_not_divide():
    placement = ExpertPlacement(num_experts=8, ep_size=3)
    assert [list(placement.owned_by(rank)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_rank_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"ep_size \(5\).*num_experts \(4\)"):
        ExpertPlacement(num_experts=4, ep_size=5)
    with pytest.raises(ValueError, match=r"ep_rank \(3\)"):
        ExpertPlacement(num_experts=4, ep_size=3).owned_by(3)
