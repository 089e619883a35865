"""What trains the gate: its combine weights, and an auxiliary loss where one is asked for; never the bias."""

import pytest
import torch
from torch.nn.functional import linear, logsigmoid

from dispatch.balance import attach_law, layout_of, routers_of, write_bias, write_state
from dispatch.config import MoEConfig
from dispatch.exchange.local import LocalDispatcher
from dispatch.laws import LAWS, BalanceConfig, Law
from dispatch.layer import MoELayer
from workers.training.aux_losses import AuxLossConfig, AuxLosses


def _layer():
    torch.manual_seed(3)
    return MoELayer(8, MoEConfig(num_experts=8, top_k=2, ffn_hidden=4), LocalDispatcher(8))


def _gate_gradient_of_weights(layer, x):
    """The gate's gradient, and what the gradient of its combine weights alone makes of it, by the same operations."""
    given = {}

    def keep(_module, inputs, outputs):
        outputs[1].retain_grad()
        given.update(x=inputs[0], ids=outputs[0], weights=outputs[1])

    handle = layer.router.register_forward_hook(keep)
    loss = layer(x).square().sum()
    handle.remove()
    aux = getattr(layer, "aux", None)
    (loss if aux is None else loss + aux.take()).backward()
    weight = layer.router.weight.detach().clone().requires_grad_()
    logits_TK = linear(given["x"], weight).gather(1, given["ids"])
    (logsigmoid(logits_TK).softmax(-1) * layer.config.route_scale).backward(given["weights"].grad)
    return layer.router.weight.grad, weight.grad


def _with_law(law, layer):
    routers = routers_of(layer)
    made = Law(BalanceConfig(law=law), layout_of(routers))
    attach_law(routers, made)
    write_state(routers, made.initial_state())
    write_bias(routers, torch.linspace(-0.3, 0.3, 8))
    return layer


@pytest.mark.parametrize("law", sorted(LAWS))
def test_without_auxiliary_loss_only_the_combine_weights_train_the_gate(law):
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    layer = _with_law(law, _layer())
    assert layer.router.observer is None
    grad, of_weights = _gate_gradient_of_weights(layer, x)
    assert torch.equal(grad, of_weights)
    for loss, z_alpha in (("switch", 0.0), ("global_batch", 0.0), ("sequence", 0.0), ("none", 1e-3)):
        layer = _with_law(law, _layer())
        layer.aux = AuxLosses(layer, AuxLossConfig(loss=loss, z_alpha=z_alpha))
        grad, of_weights = _gate_gradient_of_weights(layer, x)
        assert not torch.equal(grad, of_weights)


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("loss", ["none", "switch", "global_batch", "sequence"])
def test_no_loss_has_a_gradient_by_the_bias(law, loss):  # B14
    layer = _with_law(law, _layer())
    layer.router.expert_bias_E.requires_grad_()
    aux = AuxLosses(layer, AuxLossConfig(loss=loss, alpha=1.0, z_alpha=1.0))
    total = layer(torch.randn(2, 9, 8)).square().sum() + aux.take()
    assert total.requires_grad
    (grad,) = torch.autograd.grad(total, layer.router.expert_bias_E, allow_unused=True)
    assert grad is None or not grad.any()
