import math

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from dispatch.config import MoEConfig, RouterConfig
from dispatch.diagnosis.activity_tracker import ActivityTracker
from dispatch.exchange.local import LocalDispatcher
from dispatch.layer import MoELayer
from dispatch.routing.router import Router
from tests.ranks import run_ranks
from tests.workers.training.slow_aux_losses import slow_balance_loss, slow_sequence_loss, slow_z_loss
from workers.training.aux_losses import (
    AuxLossConfig,
    AuxLosses,
    balance_loss_sum,
    counts_by_unit,
    probabilities,
    sums_by_unit,
)

LOSSES = ("switch", "global_batch", "sequence")


def _gate(num_experts=4, top_k=2, score="softmax", dtype=torch.float64):
    """A router whose logits are its input."""
    router = Router(num_experts, RouterConfig(num_experts=num_experts, top_k=top_k, score=score)).to(dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def _layer():
    torch.manual_seed(3)
    return MoELayer(8, MoEConfig(num_experts=8, top_k=2, ffn_hidden=4), LocalDispatcher(8))


def _take_after(router, x_TE, loss, mask=None, num_sequences=1, **config):
    aux = AuxLosses(router, AuxLossConfig(loss=loss, **{"alpha": 1.0, **config}))
    router(x_TE, mask, num_sequences)
    return aux.take()


def _value(*args, **config):
    return _take_after(*args, **config).detach()


def test_hand_worked_loss_of_two_tokens():
    # Token 0 chooses experts 0 and 1, token 1 chooses 2 and 0: c = [2, 1, 1, 0], f = 4 c / 4.
    probs_TE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.3, 0.1, 0.5, 0.1]], dtype=torch.float64)
    ids_TK = torch.tensor([[0, 1], [2, 0]])
    # As one unit: sum_i f_i n P_i = 2 * 0.7 + 1 * 0.4 + 1 * 0.7 + 0 * 0.2 = 2.5. As two: 2 * 0.7 + 2 * 0.8 = 3.
    for num_units, counts, expected in ((1, [[2, 1, 1, 0]], 2.5), (2, [[1, 1, 0, 0], [1, 0, 1, 0]], 3.0)):
        counts_UE = counts_by_unit(ids_TK, 4, None, num_units)
        assert counts_UE.tolist() == counts
        total = balance_loss_sum(counts_UE, sums_by_unit(probs_TE, None, num_units))
        assert float(total) == pytest.approx(expected, rel=1e-14)
    # Divided by the two tokens: the switch loss is 1.25, the sequence-wise one, of two sequences, 1.5.
    router = _gate()
    assert float(_value(router, probs_TE.log(), "switch")) == pytest.approx(2.5, rel=1e-14)
    assert float(_value(router, probs_TE.log(), "global_batch", alpha=0.1)) == pytest.approx(0.25, rel=1e-14)
    assert float(_value(router, probs_TE.log(), "sequence", num_sequences=2)) == pytest.approx(3.0, rel=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_even_load_gives_one_and_everything_on_one_expert_gives_num_experts(loss):
    even_TE, one_TE = torch.eye(4).double() * 30, torch.tensor([[30.0, 0, 0, 0]] * 4).double()
    assert float(_value(_gate(top_k=1), even_TE, loss)) / 4 == pytest.approx(1.0, rel=1e-9)
    assert float(_value(_gate(top_k=1), one_TE, loss)) / 4 == pytest.approx(4.0, rel=1e-9)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_losses_and_gradients_equal_the_papers_formulas(score):
    generator = torch.Generator().manual_seed(1)
    x_TE = torch.randn(15, 6, dtype=torch.float64, generator=generator)
    lengths, mask = (5, 2, 3), torch.arange(5).repeat(3) < torch.tensor([5, 2, 3]).repeat_interleave(5)
    bias_E = torch.linspace(-2, 2, 6)
    for loss in LOSSES:
        router = _gate(6, 3, score)
        router.expert_bias_E.copy_(bias_E)
        x = x_TE.clone().requires_grad_()
        value = _take_after(router, x, loss, mask, 3, alpha=0.5, z_alpha=0.25) / 10
        value.backward()
        chosen = router(x_TE)[0][mask]  # by score + bias
        assert not torch.equal(chosen.sort().values, x_TE[mask].topk(3).indices.sort().values)
        y, weight = x_TE.clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
        logits = linear(y, weight)
        balance = (
            slow_sequence_loss(logits, 3, score, lengths, 5)
            if loss == "sequence"
            else slow_balance_loss(logits[mask], chosen, score)
        )
        expected = 0.5 * balance + 0.25 * slow_z_loss(logits[mask])
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-9, atol=1e-13)
        assert not x.grad[~mask].any()


def test_tiny_scores_do_not_escape_the_loss():  # B19
    # sigmoid(-57.6) is 1e-25: beside an epsilon of 1e-20 every probability, and with it the loss, would vanish.
    x_TE = torch.tensor([[0.0, -1.0, -2.0, -2.5]]).repeat(6, 1) - 57.6
    assert float(x_TE.sigmoid().max()) < 1.1e-25
    for score in ("sigmoid", "softmax"):
        router = _gate(score=score, dtype=torch.float32)
        loss = _take_after(router, x_TE, "sequence", num_sequences=2, alpha=1e-4) / 6
        assert loss.item() >= 1e-4
        assert loss.item() == pytest.approx(1e-4 * float(slow_sequence_loss(x_TE, 2, score, (3, 3), 3)), rel=1e-5)
        loss.backward()
        assert float(router.weight.grad.abs().max()) > 1e-5
    assert torch.isfinite(probabilities(torch.full((1, 4), -1e4), "sigmoid")).all()


# A micro-batch of 3 tokens of which 1 is real, and one of 3 real tokens; top-1 of 2 experts.
FEW, MANY = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
FEW_MASK, MANY_MASK = torch.tensor([True, False, False]), torch.tensor([True, True, True])


def _accumulated(*micro_batches):
    router = _gate(2, 1)
    aux = AuxLosses(router, AuxLossConfig(loss="global_batch", alpha=1.0))
    taken = []
    for probs_TE, mask_T in micro_batches:
        router(probs_TE.double().log(), mask_T)
        taken.append(float(aux.take().detach()))
    return taken, float(aux.sums[0])


def test_counts_of_uneven_micro_batches_are_divided_by_the_tokens_that_were_counted():  # B12
    few, many = (FEW, FEW_MASK), (MANY, MANY_MASK)
    # Counts: few [1, 0], many [2, 1], both [3, 1], so f = 2/1 [1, 0], 2/3 [2, 1], 2/4 [3, 1]. Sums of probabilities:
    # few [0.8, 0.2], many [1.8, 1.2].
    (first, last), total = _accumulated(few, many)
    assert first == pytest.approx(2.0 * 0.8)
    assert last == pytest.approx(1.5 * 1.8 + 0.5 * 1.2)
    assert total == pytest.approx(first + last)
    (first, last), total = _accumulated(many, few)
    assert first == pytest.approx(4 / 3 * 1.8 + 2 / 3 * 1.2)
    assert last == pytest.approx(1.5 * 0.8 + 0.5 * 0.2)
    # With equal loads the order does not matter at all, whatever the number of tokens: f is 1.5 and 0.5 throughout.
    four, eight = (
        (torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]]).repeat(times, 1), None) for times in (1, 2)
    )
    sums = [_accumulated(*order)[1] for order in ((four, eight), (eight, four))]
    assert sums == pytest.approx([3 * (1.5 * 2.6 + 0.5 * 1.4)] * 2)


def test_a_new_step_starts_from_zero_counts():  # B12
    router = _gate(2, 1)
    aux = AuxLosses(router, AuxLossConfig(loss="global_batch", alpha=1.0))
    for probs_TE, mask_T, expected in ((MANY, MANY_MASK, 4 / 3 * 1.8 + 2 / 3 * 1.2), (FEW, FEW_MASK, 1.6)):
        aux.begin_step()
        router(probs_TE.double().log(), mask_T)
        assert float(aux.take().detach()) == pytest.approx(expected)
        assert aux.sums.tolist() == pytest.approx([expected, 0.0])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_uneven_sequences_in_any_micro_batches_and_order_sum_to_the_same(order):  # B12
    generator = torch.Generator().manual_seed(5)
    x_BSE, masks = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator), [[1, 1, 1, 1], [1, 0, 0, 0], [0] * 4]
    mask_BS = torch.tensor(masks, dtype=torch.bool)
    config, router = AuxLossConfig(loss="sequence", alpha=1.0, z_alpha=0.5), _gate(6, 2)
    aux = AuxLosses(router, config)
    router(x_BSE.flatten(0, 1), mask_BS.flatten(), 3)
    whole = aux.take()
    aux.begin_step()
    parts = []
    for index in order:
        router(x_BSE[index], mask_BS[index], 1)
        parts.append(aux.take())
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    assert float(whole.detach()) > 5  # five tokens


def _global_batch_of(rank, world_size, probs_TE, shares):
    import torch.distributed as dist

    router = _gate(6, 2)
    config, tracker = AuxLossConfig(loss="global_batch", alpha=1.0), ActivityTracker()
    aux = AuxLosses(router, config, dist.group.WORLD if world_size > 1 else None, tracker)
    router(probs_TE.split(shares)[rank].log())
    loss = aux.take() / len(probs_TE)
    assert sum(tracker.read().started.values()) == (world_size > 1)  # or the driver could not explain a hang in it
    loss.backward()
    dist.all_reduce(router.weight.grad)
    dist.all_reduce(loss.detach())
    return loss.detach(), router.weight.grad


def test_global_batch_is_that_of_one_process_for_any_share_of_the_ranks_also_an_empty_one():  # B12
    generator = torch.Generator().manual_seed(5)
    probs_TE = torch.rand(12, 6, dtype=torch.float64, generator=generator).softmax(-1)
    (whole, whole_grad), *_ = run_ranks(1, _global_batch_of, probs_TE, [12])
    for shares in ([12, 0], [5, 7], [0, 0, 12], [1, 10, 1]):
        for loss, grad in run_ranks(len(shares), _global_batch_of, probs_TE, shares):
            torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
            torch.testing.assert_close(grad, whole_grad, rtol=1e-10, atol=1e-15)


def test_z_loss_of_hand_worked_logits():
    router = _gate()
    x_TE = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [9, 9, 9, 9]]).double()
    mask = torch.tensor([True, True, False])
    value = _take_after(router, x_TE, "none", mask, z_alpha=2.0)
    assert value.item() == pytest.approx(2 * (math.log(4) ** 2 + (1 + math.log(4)) ** 2), rel=1e-14)


def _grads(x, config, **recompute):
    layers = torch.nn.ModuleList(_layer() for _ in range(2))
    aux = AuxLosses(layers, config)
    for x_BSH in x:
        y = x_BSH
        for layer in layers:
            y = y + (checkpoint(layer, y, **recompute) if recompute else layer(y))
        (y.square().sum() + aux.take()).backward()
    return [parameter.grad for parameter in layers.parameters()], aux.sums


@pytest.mark.parametrize("loss", LOSSES)
def test_recompute_adds_each_loss_once(loss):
    x = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (0, 1)]
    config = AuxLossConfig(loss=loss, alpha=1.0, z_alpha=1.0)
    plain, plain_sums = _grads(x, config)
    again, again_sums = _grads(x, config, use_reentrant=False)
    assert torch.equal(plain_sums, again_sums)
    for left, right in zip(plain, again, strict=True):
        assert torch.equal(left, right)
    with pytest.raises(RuntimeError, match=r"0\.router has had no forward with gradients .* non-reentrant"):
        _grads(x, config, use_reentrant=True)


def test_forwards_that_do_not_train_and_frozen_routers_take_no_part():
    layers = torch.nn.ModuleList(_layer() for _ in range(2))
    layers[0].router.weight.requires_grad_(False)
    aux = AuxLosses(layers, AuxLossConfig(loss="switch"))
    assert layers[0].router.observer is None
    x = torch.randn(3, 8)
    with torch.no_grad():
        layers[1](x)
    layers.eval()
    layers[1](x)
    with pytest.raises(RuntimeError, match=r"1\.router has had no forward"):
        aux.take()
    layers.train()
    layers[1](x)
    assert float(aux.take().detach()) > 0
    for config, learning in ((AuxLossConfig(loss="switch"), layers[0]), (AuxLossConfig(), _layer())):
        nothing = AuxLosses(learning, config)
        assert learning.router.observer is None
        assert not nothing.take().any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "gshard"}, "aux.loss is 'gshard'; it must be none, switch, global_batch or sequence"),
        ({"alpha": -1e-3}, r"aux.alpha \(-0.001\) must be a finite number, at least 0"),
        ({"z_alpha": math.inf}, r"aux.z_alpha \(inf\) must be a finite number"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AuxLossConfig(**fields)
    assert not AuxLossConfig().active
