"""Biased and clamped experts against plain autograd, token by token: by grouped matmuls, in a loop, and in chunks."""

import pytest
import torch

from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.errors import InvalidValue
from dispatch.exchange.local import LocalDispatcher
from dispatch.experts.grouped_matmul import takes_grouped_mm
from dispatch.experts.stacked import Experts
from dispatch.experts.variants import VariantExperts
from dispatch.layer import MoELayer
from dispatch.routing.replay import Routing

TOKENS, HIDDEN, FFN, NUM_EXPERTS = 11, 8, 12, 5
VARIANTS = {
    "biases": {"expert_biases": True},
    "clamped": {"swiglu_limit": 0.4, "swiglu_alpha": 1.3},  # many gates and ups are beyond
    "both": {"expert_biases": True, "swiglu_limit": 0.4},
}
# Experts of each token: uneven with one expert empty, all to one pair, and no token at all.
CHOICES = {
    "uneven": [[0, 1], [0, 2], [0, 1], [2, 0], [0, 4]] * 2 + [[1, 2]],
    "all to one pair": [[3, 2]] * TOKENS,
    "empty": [],
}


def build(variant, dtype=torch.float64, ffn_hidden=FFN, **schedule):
    torch.manual_seed(0)
    config = MoEConfig(
        num_experts=NUM_EXPERTS, top_k=2, ffn_hidden=ffn_hidden, num_shared_experts=0, score="softmax", **variant
    )
    layer = MoELayer(HIDDEN, config, LocalDispatcher(NUM_EXPERTS), ScheduleConfig(**schedule)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def slow_layer(layer, x_TH, ids):
    """One token and one expert after the other, by the formula of the paper."""
    experts, config, rows = layer.experts, layer.config, []
    for x_H, chosen in zip(x_TH, ids, strict=True):
        weights = (layer.router.weight @ x_H)[chosen].softmax(0)
        y_H = torch.zeros_like(x_H)
        for weight, expert in zip(weights, chosen, strict=True):
            inner, out = experts.gate_up_proj[expert] @ x_H, 0.0
            if config.expert_biases:
                inner, out = inner + experts.gate_up_proj_bias[expert], experts.down_proj_bias[expert]
            gate, up = inner.chunk(2)
            if config.swiglu_limit:
                gate = gate.clamp(max=config.swiglu_limit)
                up = up.clamp(-config.swiglu_limit, config.swiglu_limit) + 1
            slope = config.swiglu_alpha if config.swiglu_limit else 1.0
            activated = up * gate / (1 + (-slope * gate).exp())
            y_H = y_H + weight * (experts.down_proj[expert] @ activated + out)
        rows.append(y_H)
    return torch.stack(rows) if rows else x_TH


def results(layer, x_TH, compute):
    """Outputs and all gradients, of the input first."""
    x_TH = x_TH.clone().requires_grad_()
    y_TH = compute(x_TH)
    (y_TH * torch.arange(1.0, y_TH.numel() + 1, dtype=y_TH.dtype).view_as(y_TH)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    return {"y": y_TH.detach(), "x": x_TH.grad} | gradients


@pytest.mark.parametrize("schedule", [{}, {"num_chunks": 3}, {"max_rows": 4}], ids=["whole", "chunks", "rounds"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_all_gradients_are_those_of_one_expert_after_the_other(variant, choice, dtype, limit, schedule):
    layer, ids = build(VARIANTS[variant], dtype, **schedule), CHOICES[choice]
    assert isinstance(layer.experts, VariantExperts)
    x_TH = torch.randn(len(ids), HIDDEN, dtype=torch.float64).to(dtype)
    # fp32 takes the grouped matmul, float64 has none.
    assert takes_grouped_mm(x_TH, FFN) == (dtype == torch.float32)
    routing = Routing(torch.tensor(ids, dtype=torch.int64).view(-1, 2))
    got = results(layer, x_TH, lambda x_TH: layer(x_TH, routing=routing))
    want = results(layer, x_TH, lambda x_TH: slow_layer(layer, x_TH, ids))
    for name, expected in want.items():
        wanted = torch.zeros_like(got[name]) if expected is None else expected
        assert (got[name] - wanted).norm() <= limit * wanted.norm(), name


def test_bf16_rows_come_close_and_experts_without_rows_have_zero_gradients():
    layer, ids = build(VARIANTS["both"], torch.float32), CHOICES["all to one pair"]
    x_TH, routing = torch.randn(TOKENS, HIDDEN), Routing(torch.tensor(ids))
    expected = slow_layer(layer, x_TH, ids)
    with torch.autocast("cpu", torch.bfloat16):
        y_TH = layer(x_TH, routing=routing)
    assert y_TH.dtype == torch.bfloat16
    torch.testing.assert_close(y_TH.float(), expected, rtol=0.05, atol=0.05)
    y_TH.float().sum().backward()
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad[[0, 1, 4]].eq(0).all(), name
        assert parameter.grad[[2, 3]].any(), name


def test_frozen_experts_pass_gradients_on():
    layer = build(VARIANTS["both"])
    layer.experts.requires_grad_(False)
    x_TH = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    layer(x_TH).sum().backward()
    assert x_TH.grad.any()
    assert layer.router.weight.grad.any()
    assert all(parameter.grad is None for parameter in layer.experts.parameters())


def test_plain_experts_have_their_own_kernels():
    assert type(build({}).experts) is Experts


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"swiglu_limit": -1.0}, r"swiglu_limit \(-1.0\) must be at least 0 and finite"),
        ({"swiglu_limit": float("inf")}, r"swiglu_limit \(inf\) must be at least 0"),
        ({"swiglu_alpha": 0.0}, r"swiglu_alpha \(0.0\) above 0"),
    ],
)
def test_an_impossible_activation_is_refused(variant, message):
    with pytest.raises(InvalidValue, match=message):
        MoEConfig(**variant)
