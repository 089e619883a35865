import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.config import RouterConfig
from dispatch.errors import InvalidValue
from dispatch.parity.reference import reference_choice
from dispatch.routing.selection import biased_scores, ordered_topk


def _choose(scores, bias, config):
    return ordered_topk(biased_scores(torch.tensor(scores), torch.tensor(bias), **config.groups), config.top_k).tolist()


def test_ties_go_to_the_lowest_expert():  # B22
    values = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.7, 0.7, 0.1], [-0.0, 0.0, -1.0, -0.0]])
    assert ordered_topk(values, 2).tolist() == [[0, 1], [1, 2], [0, 1]]


def test_order_is_by_value_across_signs_and_infinities():
    values = torch.tensor([[-float("inf"), -3.0, 2.0, -0.5, float("inf"), 1e-40]])
    assert ordered_topk(values, 6).tolist() == [[4, 2, 5, 3, 1, 0]]


def test_group_score_sums_the_two_best_and_not_the_maximum():  # B16
    # Groups:      0: .9 + .1 = 1.0     1: .6 + .6 = 1.2     2: .5 + .0 = .5
    scores = [[0.9, 0.1, 0.0, 0.6, 0.6, 0.1, 0.5, 0.0, 0.0]]
    config = RouterConfig(num_experts=9, top_k=2, num_groups=3, groups_kept=1)
    assert _choose(scores, [0.0] * 9, config) == [[3, 4]]


def test_scores_per_group_other_than_two_changes_the_group():  # B16
    # top_k / groups_kept is 3 here; DeepSeek's code always takes 2.
    # Best two:   0: .9 + .5 = 1.4 > 1: 1.2     Best three:   0: 1.4 + 0 < 1: .6 + .6 + .5 = 1.7
    scores = [[0.9, 0.5, 0.0, 0.6, 0.6, 0.5]]
    two = RouterConfig(num_experts=6, top_k=3, num_groups=2, groups_kept=1, scores_per_group=2)
    three = RouterConfig(num_experts=6, top_k=3, num_groups=2, groups_kept=1, scores_per_group=3)
    assert _choose(scores, [0.0] * 6, two) == [[0, 1, 2]]
    assert _choose(scores, [0.0] * 6, three) == [[3, 4, 5]]


def test_negative_biased_scores_stay_inside_the_chosen_groups():  # B17
    torch.manual_seed(0)
    config = RouterConfig(num_experts=16, top_k=8, num_groups=4, groups_kept=2)
    scores = torch.rand(200, 16)
    ids = ordered_topk(biased_scores(scores, torch.full((16,), -3.0), **config.groups), config.top_k)
    assert config.top_k == ids.shape[1]
    # Two groups of four hold exactly the eight chosen.
    assert all(len({expert // 4 for expert in row}) == 2 for row in ids.tolist())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_groups": 0}, r"num_groups \(0\) must be at least 1"),
        ({"route_scale": 0.0}, r"route_scale \(0.0\) must be above 0"),
        ({"route_scale": float("nan")}, r"route_scale \(nan\) must be above 0 and finite"),
    ],
)
def test_impossible_routing_is_refused(values, words):
    with pytest.raises(InvalidValue, match=words):
        RouterConfig(**values)


@st.composite
def _routing_cases(draw):
    num_groups = draw(st.sampled_from([1, 2, 4]))
    size = draw(st.integers(2, 4))
    kept = draw(st.integers(1, num_groups))
    config = RouterConfig(
        num_experts=num_groups * size,
        top_k=draw(st.integers(1, kept * size)),
        num_groups=num_groups,
        groups_kept=kept,
        scores_per_group=draw(st.integers(1, size)),
    )
    # Few distinct values, so that ties are common; multiples of 1/8, so that sums are exact in any order.
    value = st.integers(-16, 16).map(lambda n: n / 8)
    num_tokens = draw(st.integers(0, 4))
    scores = [
        draw(st.lists(value, min_size=config.num_experts, max_size=config.num_experts)) for _ in range(num_tokens)
    ]
    return config, scores, draw(st.lists(value, min_size=config.num_experts, max_size=config.num_experts))


@settings(derandomize=True)
@given(_routing_cases())
def test_choice_equals_the_reference(case):  # B16, B17, B22
    config, scores, bias = case
    if scores:
        assert _choose(scores, bias, config) == [reference_choice(row, bias, config) for row in scores]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts": 8, "top_k": 9}, r"top_k \(9\).*num_experts \(8\)"),
        ({"num_experts": 10, "num_groups": 4}, r"num_experts \(10\).*num_groups \(4\)"),
        ({"num_experts": 8, "top_k": 5, "num_groups": 2, "groups_kept": 1}, r"groups_kept \(1\).*top_k \(5\)"),
        ({"num_experts": 8, "num_groups": 4, "groups_kept": 4, "scores_per_group": 3}, r"scores_per_group \(3\)"),
        ({"score": "tanh"}, "'tanh'"),
    ],
)
def test_impossible_routing_is_refused_with_the_values(fields, said):
    with pytest.raises(ValueError, match=said):
        RouterConfig(**fields)
