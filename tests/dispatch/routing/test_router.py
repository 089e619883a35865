import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dispatch.balance import read_bias, routers_of, write_bias
from dispatch.config import MoEConfig, RouterConfig
from dispatch.exchange.local import LocalDispatcher
from dispatch.layer import MoELayer
from dispatch.routing.replay import Routing, replay
from dispatch.routing.router import Router


def _router(hidden=8, **fields):
    torch.manual_seed(0)
    return Router(hidden, RouterConfig(**{"num_experts": 8, "top_k": 2, **fields}))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_bias_chooses_but_never_weighs(score):  # B14, P14
    router = _router(score=score, route_scale=2.5)
    x = torch.randn(50, 8)
    ids, weights = router(x)
    torch.testing.assert_close(weights.sum(1), torch.full((50,), 2.5))
    router.expert_bias_E.fill_(7.0)  # a constant changes no choice
    ids_shifted, weights_shifted = router(x)
    assert torch.equal(ids, ids_shifted)
    assert torch.equal(weights, weights_shifted)
    router.expert_bias_E.copy_(torch.linspace(-1, 1, 8))
    ids_other, weights_other = router(x)
    assert not torch.equal(ids, ids_other)
    logits = x @ router.weight.T
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    chosen = scores.gather(1, ids_other)
    torch.testing.assert_close(weights_other, 2.5 * chosen / chosen.sum(1, keepdim=True))


def test_bias_is_a_buffer_without_gradient():  # B14, B15, P14
    router = _router()
    before = router.expert_bias_E.clone()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    optimizer = torch.optim.AdamW(router.parameters(), lr=1.0, weight_decay=0.5)
    router(torch.randn(20, 8))[1].square().sum().backward()
    optimizer.step()
    assert router.expert_bias_E.grad is None
    assert not router.expert_bias_E.requires_grad
    assert torch.equal(router.expert_bias_E, before)
    assert "expert_bias_E" in router.state_dict()  # B25: persistent


@pytest.mark.parametrize("logit", [-50.0, -200.0])
def test_weights_of_underflowing_scores_are_finite_and_sum_to_the_scale(logit):  # B18
    router = _router(hidden=1, num_experts=4, route_scale=2.0)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[logit], [logit], [5.0], [5.0]]))
    router.expert_bias_E.copy_(torch.tensor([50.0, 50.0, 0.0, 0.0]))  # forces the two that underflow
    ids, weights = router(torch.ones(3, 1))
    assert ids.tolist() == [[0, 1]] * 3
    torch.testing.assert_close(weights, torch.ones(3, 2))
    weights.sum().backward()
    assert torch.isfinite(router.weight.grad).all()


def test_gate_runs_in_fp32_whatever_the_dtype_of_the_model():  # B22
    router = _router(hidden=64, num_experts=64, top_k=8)
    x = torch.randn(500, 64).bfloat16()
    ids, weights = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        ids_autocast, weights_autocast = router(x)
    ids_cast, weights_cast = router.bfloat16()(x)
    assert weights.dtype == weights_autocast.dtype == weights_cast.dtype == torch.float32
    assert torch.equal(ids, ids_autocast)
    assert torch.equal(ids, ids_cast)
    assert router.weight.dtype == torch.float32
    assert router.double().weight.dtype == torch.float64


def test_the_bias_of_the_gate_is_a_weight_of_its_logits_and_not_the_selection_bias():
    torch.manual_seed(0)
    router, x = Router(6, RouterConfig(num_experts=8, top_k=3, score="softmax", gate_bias=True)), torch.randn(5, 6)
    assert not router.gate_bias.any()
    with torch.no_grad():
        router.gate_bias.normal_()
    logits = x @ router.weight.T + router.gate_bias
    ids, weights = router(x)
    assert torch.equal(ids, logits.topk(3).indices)
    torch.testing.assert_close(weights, logits.gather(1, ids).softmax(-1))
    assert torch.equal(weights, replay(router, x, Routing(ids), "here")[1])
    weights[:, 0].sum().backward()
    assert router.gate_bias.grad.any()
    assert not router.expert_bias_E.any()
    before = router.gate_bias.detach().clone()
    assert torch.equal(router.bfloat16().gate_bias, before)


def test_bias_and_counts_keep_their_dtype_and_bits_under_any_cast():  # B1, B23
    router = _router()
    router.expert_bias_E.copy_(torch.arange(8) * 0.1 + 0.001)  # 0.501 is not a bf16 number
    router.tokens_per_expert_E.fill_(40_840)
    before = router.expert_bias_E.clone()
    for cast in (torch.bfloat16, torch.float64, torch.float16):
        router.to(cast)
        assert router.expert_bias_E.dtype == torch.float32
        assert torch.equal(router.expert_bias_E, before)
        assert router.tokens_per_expert_E.dtype == torch.int64
        assert router.tokens_per_expert_E.tolist() == [40_840] * 8
    clone = _router().bfloat16()
    clone.load_state_dict(router.state_dict())
    assert clone.expert_bias_E.dtype == torch.float32
    assert torch.equal(clone.expert_bias_E, before)


def test_bias_moves_in_place():  # B24
    model = MoELayer(8, MoEConfig(num_experts=4, top_k=2, ffn_hidden=4), LocalDispatcher(4))
    routers = routers_of(model)
    pointer = model.router.expert_bias_E.data_ptr()
    write_bias(routers, torch.tensor([0.1, -0.1, 0.2, -0.2]))
    assert model.router.expert_bias_E.data_ptr() == pointer
    assert torch.equal(model.state_dict()["router.expert_bias_E"], read_bias(routers))


def test_a_bias_of_another_dtype_or_length_is_refused():  # B23
    model = MoELayer(8, MoEConfig(num_experts=4, top_k=2, ffn_hidden=4), LocalDispatcher(4))
    with pytest.raises(ValueError, match="float32 of shape"):
        write_bias(routers_of(model), torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        write_bias(routers_of(model), torch.zeros(5))


def test_a_layer_built_on_meta_starts_with_bias_zero():  # B27
    with torch.device("meta"):
        model = MoELayer(8, MoEConfig(num_experts=4, top_k=2, ffn_hidden=4), LocalDispatcher(4))
    model.to_empty(device="cpu")
    model.router.expert_bias_E.fill_(float("nan"))
    model.router.reset_parameters()
    assert model.router.expert_bias_E.tolist() == [0.0] * 4
    assert model.router.expert_bias_E.dtype == torch.float32
    assert model.router.tokens_per_expert_E.tolist() == [0] * 4


def test_padding_is_not_counted():  # B5, P12
    router = _router(num_experts=6, top_k=3)
    x = torch.randn(5, 8)
    mask = torch.tensor([True, True, False, True, False])
    router(x, mask)
    masked = router.tokens_per_expert_E.clone()
    assert masked.sum() == 3 * 3
    router.tokens_per_expert_E.zero_()
    router(x[mask])
    assert torch.equal(router.tokens_per_expert_E, masked)


def test_only_forwards_that_train_are_counted():  # B3, P11
    router = _router()
    x = torch.randn(10, 8)
    with torch.no_grad():
        router(x)
    router.eval()
    router(x)
    assert router.tokens_per_expert_E.sum() == 0
    router.train()
    router(x)
    assert router.tokens_per_expert_E.sum() == 20


class _Stack(torch.nn.Module):
    """Three MoE layers; `reentrant[i]` is None (kept), True or False (recomputed that way)."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(1)
        config = MoEConfig(num_experts=8, top_k=2, ffn_hidden=4)
        self.layers = torch.nn.ModuleList(MoELayer(8, config, LocalDispatcher(8)) for _ in reentrant)
        self.reentrant = reentrant
        self.chosen = []
        for layer in self.layers:
            layer.router.register_forward_hook(lambda _m, _i, out: self.chosen.append(out[0].tolist()))

    def forward(self, x):
        for layer, reentrant in zip(self.layers, self.reentrant, strict=True):
            x = x + (layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant))
        return x


def _counts_and_grads(reentrant, micro_batches):
    model = _Stack(reentrant)
    for x in micro_batches:
        model(x.clone().requires_grad_()).square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [layer.router.tokens_per_expert_E.tolist() for layer in model.layers], grads, model.chosen


@pytest.mark.parametrize("reentrant", [(False,) * 3, (True,) * 3, (None, True, False), (False, None, True)])
def test_recompute_counts_once_and_chooses_the_same(reentrant):  # B2, B38, P6
    torch.manual_seed(2)
    micro_batches = [torch.randn(7, 8), torch.randn(4, 8)]
    plain_counts, plain_grads, plain_chosen = _counts_and_grads((None,) * 3, micro_batches)
    counts, grads, chosen = _counts_and_grads(reentrant, micro_batches)
    assert counts == plain_counts
    for grad, plain in zip(grads, plain_grads, strict=True):
        assert torch.equal(grad, plain)
    assert sorted(map(str, set(map(str, chosen)))) == sorted(
        set(map(str, plain_chosen))
    )  # the recompute adds no new choice


@pytest.mark.parametrize("reentrant", [(None,) * 3, (False,) * 3, (True,) * 3, (None, True, False)])
def test_scores_are_heard_once_of_every_training_forward(reentrant):
    model, heard = _Stack(reentrant), []
    for layer in model.layers:
        layer.router.on_scores = lambda scores_TE: heard.append(scores_TE.shape)
    for num_tokens in (7, 4):
        model(torch.randn(num_tokens, 8).requires_grad_()).square().sum().backward()
    assert heard == [(7, 8)] * 3 + [(4, 8)] * 3
    model.eval()
    model(torch.randn(5, 8).requires_grad_())
    assert len(heard) == 6


def test_moving_the_bias_between_forward_and_recompute_is_refused():  # B38
    model = _Stack((False,) * 3)
    loss = model(torch.randn(7, 8, requires_grad=True)).square().sum()
    write_bias(routers_of(model), torch.ones(24))
    with pytest.raises(RuntimeError, match="between a forward and its recompute"):
        loss.backward()
