"""Shapes: T tokens, E experts, K top-k."""

import pytest
import torch

from dispatch.balance import attach_law, layout_of, read_counts, reset_counts, routers_of, write_state
from dispatch.config import MoEConfig, RouterConfig
from dispatch.laws import BalanceConfig, Law, LawState
from dispatch.routing.router import Router
from dispatch.routing.selection import biased_scores, ordered_topk
from dispatch.routing.statistics import (
    HISTOGRAM_BINS,
    CutoffHistogram,
    NearCutoff,
    RouterChoice,
    histogram_range,
    make_statistic,
)

GROUPS = {"num_groups": 4, "groups_kept": 2, "scores_per_group": 2}


def _routing(scores_TE, bias_E, top_k, scale=0.0, **groups):
    biased_TE = biased_scores(scores_TE, bias_E, **groups)
    return RouterChoice(scores_TE, biased_TE, ordered_topk(biased_TE, top_k), bias_E, torch.tensor(scale))


@pytest.mark.parametrize("groups", [{}, GROUPS])
@pytest.mark.parametrize("top_k", [1, 3])
def test_near_cutoff_counts_the_choices_that_a_move_of_one_bias_would_flip(groups, top_k):
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(200, 16, generator=generator)
    bias_E = 0.1 * torch.randn(16, generator=generator)
    scale = 0.03
    counted = NearCutoff().count(_routing(scores_TE, bias_E, top_k, scale, **groups), None)
    # Brute force on what is compared: groups are chosen before, and stay.
    biased_TE = biased_scores(scores_TE, bias_E, **groups)
    expected = []
    for expert in range(16):
        flipped = torch.zeros(200, dtype=torch.bool)
        chosen = (ordered_topk(biased_TE, top_k) == expert).any(1)
        for move in (scale, -scale):
            moved_TE = biased_TE.clone()
            moved_TE[:, expert] += move
            flipped |= (ordered_topk(moved_TE, top_k) == expert).any(1) != chosen
        expected.append(int(flipped.sum()))
    assert counted.dtype == torch.int64 and counted[:, 0].tolist() == expected
    assert sum(expected) > 0


def test_all_experts_chosen_means_that_none_is_near_the_cutoff():
    counted = NearCutoff().count(_routing(torch.rand(5, 4), torch.zeros(4), 4, 0.5), None)
    assert counted.tolist() == [[0]] * 4


def test_the_histogram_holds_every_token_once_and_none_at_its_ends():  # B21: the range follows the bias
    generator = torch.Generator().manual_seed(1)
    for spread in (0.0, 0.3, 5.0):  # a bias of 5 has left the range of the scores far behind
        bias_E = spread * torch.randn(8, generator=generator)
        scores_TE = torch.rand(500, 8, generator=generator)
        histogram_EW = CutoffHistogram().count(_routing(scores_TE, bias_E, 2), None)
        assert histogram_EW.shape == (8, HISTOGRAM_BINS)
        assert histogram_EW.sum(1).tolist() == [500] * 8
        assert histogram_EW[:, [0, -1]].sum() == 0
        # By hand: the bias that would reach each token is the best score left out, less the expert's own.
        biased_TE = scores_TE + bias_E
        left_out_T1 = biased_TE.sort(1, descending=True).values[:, 2:3]
        low, high = histogram_range(bias_E)
        centres = low + (torch.arange(HISTOGRAM_BINS) + 0.5) * (high - low) / HISTOGRAM_BINS
        mean_E = (histogram_EW * centres).sum(1) / 500
        assert torch.allclose(mean_E, (left_out_T1 - scores_TE).mean(0), atol=float(high - low) / HISTOGRAM_BINS)


@pytest.mark.parametrize("law", ["newton", "quantile"])
def test_padding_is_in_no_statistic(law):  # B5, P12
    counts = []
    for padding in (0, 7):
        router = _router(law)
        x_TH = torch.randn(20 + padding, 8, generator=torch.Generator().manual_seed(2))
        mask_T = torch.arange(20 + padding) < 20
        router(x_TH, mask_T)
        counts.append(router.statistic_EW.clone())
    assert counts[0].any() and counts[0].equal(counts[1])


def _router(law, **config):
    torch.manual_seed(0)
    router = Router(8, RouterConfig(num_experts=8, top_k=2, **config))
    routers = {"router": router}
    made = Law(BalanceConfig(law=law), layout_of(routers))
    attach_law(routers, made)
    write_state(routers, made.initial_state())
    return router


def test_counts_of_all_layers_lie_one_after_the_other_and_are_reset_together():
    model = torch.nn.ModuleList([Router(8, MoEConfig(num_experts=e, top_k=2)) for e in (4, 6)])
    routers = routers_of(model)
    law = Law(BalanceConfig(law="newton"), layout_of(routers))
    attach_law(routers, law)
    write_state(routers, law.initial_state())
    for router in routers.values():
        router(torch.randn(30, 8))
    counts_M = read_counts(routers)
    assert law.num_counts == 20 and counts_M.shape == (20,)
    assert counts_M[:10].sum() == 2 * 30 * 2
    assert counts_M[10:].tolist() == [*model[0].statistic_EW[:, 0].tolist(), *model[1].statistic_EW[:, 0].tolist()]
    reset_counts(routers)
    assert not read_counts(routers).any()


def test_the_scale_of_each_layer_reaches_its_router():
    model = torch.nn.ModuleList([Router(8, MoEConfig(num_experts=e, top_k=2)) for e in (4, 6)])
    routers = routers_of(model)
    attach_law(routers, Law(BalanceConfig(law="newton"), layout_of(routers)))
    write_state(routers, LawState(torch.zeros(10), {"statistic_scale": torch.tensor([0.25, 0.5])}))
    assert [float(router.statistic_scale) for router in routers.values()] == [0.25, 0.5]
    model.bfloat16()
    assert {router.statistic_scale.dtype for router in routers.values()} == {torch.float32}


def test_without_a_law_that_asks_nothing_is_counted_or_kept():
    router = _router("sign")
    router(torch.randn(9, 8))
    assert router.statistic_EW.shape == (8, 0) and router.statistic is None
    assert read_counts({"router": router}).shape == (8,)


@pytest.mark.parametrize("law", ["newton", "quantile", "warm"])
def test_laws_that_do_not_see_group_limits_are_refused_with_them(law):
    with pytest.raises(ValueError, match=r"limited to groups .*use balance\.law adaptive"):
        _router(law, num_groups=4, groups_kept=2)
    _router("adaptive", num_groups=4, groups_kept=2)


def test_an_unknown_statistic_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'entropy'.*near_cutoff"):
        make_statistic("entropy")
