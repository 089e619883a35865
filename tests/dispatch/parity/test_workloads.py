"""Every workload has the property that its name claims, on numbers that can be counted by hand."""

import pytest
import torch

from dispatch.parity.workloads import BURST_EVERY, WORKLOADS, Workload, tokens_that_choose
from dispatch.routing.selection import biased_scores, ordered_topk

# 8 experts, top-2, 2 ranks: experts 0 1 2 3 | 4 5 6 7. With 16 tokens a rank the mean load is 2 * 16 * 2 / 8 = 8.
SIZES = {"num_experts": 8, "top_k": 2, "ep_size": 2, "num_tokens": 16}


def _load(workload, step=0):
    ids = torch.cat([workload.route(rank, step) for rank in range(workload.ep_size)])
    return ids.flatten().bincount(minlength=workload.num_experts).tolist()


def _ranks_per_token(workload):
    sizes = torch.tensor([len(workload._placement.owned_by(rank)) for rank in range(workload.ep_size)])
    rank_of_expert = torch.arange(workload.ep_size).repeat_interleave(sizes)
    ids = torch.cat([workload.route(rank) for rank in range(workload.ep_size)])
    return {len(set(row)) for row in rank_of_expert[ids].tolist()}


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "ep_size"), [(8, 2, 2), (7, 3, 3), (5, 4, 3), (6, 6, 2), (4, 1, 4), (3, 2, 1)]
)
def test_each_token_chooses_different_experts_that_exist(name, num_experts, top_k, ep_size):
    workload = Workload(name=name, num_experts=num_experts, top_k=top_k, ep_size=ep_size, num_tokens=25)
    for rank, num_tokens in enumerate(workload.tokens_of_ranks()):
        for step in (0, BURST_EVERY - 1):
            ids = workload.route(rank, step)
            assert ids.shape == (num_tokens, top_k)
            assert all(len({*row} & {*range(num_experts)}) == top_k for row in ids.tolist())
    assert sum(workload.tokens_of_ranks()) == 25 * ep_size


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_arguments_give_the_same_routing_and_others_another(name):
    first, second = (Workload(name=name, **SIZES).route(1, step=3) for _ in range(2))
    assert torch.equal(first, second)
    others = [Workload(name=name, seed=seed, **SIZES).route(1, step) for seed, step in ((0, 4), (1, 3))]
    assert not any(torch.equal(first, other) for other in others)


def test_w0_gives_every_expert_the_same_load():
    assert _load(Workload(name="W0", **SIZES)) == [8] * 8


def test_w0_mixes_which_experts_go_together():
    ids = Workload(name="W0", **SIZES | {"num_tokens": 400}).route(0)
    assert len({tuple(sorted(row)) for row in ids.tolist()}) == 8 * 7 // 2


def test_w1_makes_an_eighth_of_the_experts_hot():
    load = sorted(_load(Workload(name="W1", skew=3.0, **SIZES)))
    # One of 8 has 3 times the mean of 8; the other 64 - 24 = 40 assignments are spread over 7.
    assert load[-1] == 24
    assert 4 <= load[0] <= load[-2] <= 7
    assert sorted(_load(Workload(name="W1", num_experts=16, top_k=2, ep_size=2, num_tokens=80, skew=2.0)))[-3:] == [
        pytest.approx(20 * 1.15, rel=0.2),
        40,
        40,
    ]


def test_skew_is_the_load_of_the_hottest_expert_over_the_mean():
    sizes = {"num_experts": 64, "top_k": 8, "ep_size": 4, "num_tokens": 1024}
    for name in ("W1", "W2", "W3", "W6"):
        load = torch.tensor(_load(Workload(name=name, skew=3.7, **sizes))).double()
        assert float(load.max() / load.mean()) == pytest.approx(3.7, abs=0.05)


def test_w2_sends_all_tokens_to_one_rank():
    assert _load(Workload(name="W2", **SIZES)) == [16, 16, 16, 16, 0, 0, 0, 0]
    assert _load(Workload(name="W2", seed=1, **SIZES)) == [0, 0, 0, 0, 16, 16, 16, 16]
    # top-6: the rank has 4 experts, the other 2 choices of each token go elsewhere.
    load = _load(Workload(name="W2", **SIZES | {"top_k": 6}))
    assert load == [32] * 4 + [16] * 4


@pytest.mark.parametrize(
    ("num_experts", "top_k", "ep_size"), [(8, 2, 2), (8, 2, 4), (8, 3, 4), (7, 3, 3), (7, 5, 3), (5, 4, 3), (8, 6, 4)]
)
def test_w3_puts_each_token_on_as_many_ranks_as_possible(num_experts, top_k, ep_size):
    workload = Workload(name="W3", num_experts=num_experts, top_k=top_k, ep_size=ep_size, num_tokens=100)
    assert _ranks_per_token(workload) == {min(top_k, ep_size)}
    # W0 does not: that is what the workload isolates.
    if top_k < num_experts - 1:
        assert _ranks_per_token(Workload(**vars(workload) | {"name": "W0"})) != {min(top_k, ep_size)}


def test_w3_has_the_heat_of_w1_on_every_rank():
    load = _load(Workload(name="W3", skew=3.0, **SIZES))
    assert load[0] == load[4] == 24
    assert sum(load[:4]) == sum(load[4:]) == 32


def test_w4_gives_each_rank_a_quarter_of_the_tokens_of_the_one_before():
    # 4 * 85 = 340 = 256 + 64 + 16 + 4
    workload = Workload(name="W4", **SIZES | {"ep_size": 4, "num_tokens": 85})
    assert workload.tokens_of_ranks() == [256, 64, 16, 4]
    assert [len(workload.route(rank)) for rank in range(4)] == [256, 64, 16, 4]
    # Exact but for rank 3, whose 4 tokens are half a block of 8, in which each expert is chosen twice.
    assert set(_load(workload)) <= {84, 85, 86}


def test_w5_leaves_a_source_a_rank_and_every_second_expert_without_work():
    workload = Workload(name="W5", **SIZES)
    assert workload.tokens_of_ranks() == [0, 32]
    # Rank 1 is idle as a holder of experts, and of rank 0's every second is.
    assert _load(workload) == [32, 0, 32, 0, 0, 0, 0, 0]
    assert _load(Workload(name="W5", **SIZES | {"top_k": 5})) == [32, 32, 32, 32, 32, 0, 0, 0]


def test_w6_moves_its_hot_expert_by_one_eighth_a_step():
    workload = Workload(name="W6", skew=3.0, **SIZES)
    loads = [_load(workload, step) for step in range(9)]
    assert [load.index(max(load)) for load in loads] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert {max(load) for load in loads} == {24}


def test_w7_is_calm_until_nearly_all_tokens_choose_one_expert():
    workload = Workload(name="W7", **SIZES | {"num_tokens": 80})
    assert [max(_load(workload, step)) for step in range(7)] == [40] * 7
    burst = _load(workload, 7)
    assert burst[0] == pytest.approx(0.95 * 160, abs=2)
    assert max(burst[1:]) < 40
    assert max(_load(workload, 8)) == 40


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_tokens_at_all_are_a_workload_too(name):
    assert Workload(name=name, **SIZES | {"num_tokens": 0}).route(1, 7).shape == (0, 2)


@pytest.mark.parametrize("name", WORKLOADS)
def test_tokens_that_choose_make_a_router_choose_exactly_that(name):
    torch.manual_seed(0)
    ids = Workload(name=name, **SIZES | {"top_k": 3}).route(1)
    router_weight = torch.randn(8, 12) / 12**0.5
    logits = tokens_that_choose(ids, router_weight) @ router_weight.t()
    assert torch.equal(ordered_topk(biased_scores(logits.sigmoid(), torch.zeros(8)), 3), ids)
    assert torch.equal(ordered_topk(biased_scores(logits.softmax(-1), torch.zeros(8)), 3), ids)
    biased = ordered_topk(biased_scores(logits.sigmoid(), torch.linspace(-0.1, 0.1, 8)), 3)
    assert torch.equal(biased.sort(1).values, ids.sort(1).values)


def test_arguments_that_do_not_fit_are_explained():
    with pytest.raises(ValueError, match="workload is 'W8'; it must be one of W0, W1"):
        Workload(name="W8", **SIZES)
    with pytest.raises(ValueError, match=r"top_k \(9\) must be between 1 and num_experts \(8\)"):
        Workload(name="W0", **SIZES | {"top_k": 9})
    with pytest.raises(ValueError, match=r"skew \(5\) must be between 1 and 4 in W1 .* lower skew"):
        Workload(name="W1", skew=5.0, **SIZES)
    with pytest.raises(ValueError, match=r"num_tokens \(-1\)"):
        Workload(name="W1", **SIZES | {"num_tokens": -1})
    with pytest.raises(ValueError, match=r"hidden \(4\) must be at least num_experts \(8\)"):
        tokens_that_choose(torch.zeros(1, 1, dtype=torch.int64), torch.randn(8, 4))
