"""The looped experts against plain autograd, where runs are cut, padded or empty; and the memory that they take."""

import pytest
import torch

from dispatch.config import MoEConfig
from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.local import LocalDispatcher
from dispatch.experts import looped as looped_experts
from dispatch.experts.looped import ExpertRows, LoopedSwiGLU
from dispatch.experts.weight_grads import WeightGrads
from dispatch.layer import MoELayer
from runtime.commands.bench.dispatch.memory import peak_allocated_bytes
from tests.dispatch.experts.plain_experts import plain_experts


def test_runs_are_padded_with_weightless_copies_of_row_0_and_cut_when_long(monkeypatch):
    monkeypatch.setattr(looped_experts, "MAX_RUN", 8)
    sources, weights = torch.arange(1, 15), torch.arange(14.0) + 0.5
    rows = ExpertRows.padded(sources, weights, (3, 0, 11), multiple=4)
    assert rows.runs == [(0, slice(0, 4)), (2, slice(4, 12)), (2, slice(12, 16))]
    assert rows.sources_R.tolist() == [1, 2, 3, 0, *range(4, 15), 0]
    assert rows.weights_R.tolist() == [0.5, 1.5, 2.5, 0, *(i + 0.5 for i in range(3, 14)), 0]
    assert torch.equal(rows.unpad(rows.sources_R), sources)
    assert rows.longest == 8
    whole = ExpertRows.padded(sources, weights, (4, 10, 0), multiple=1)
    assert whole.real_rows is None
    assert whole.runs == [(0, slice(0, 4)), (1, slice(4, 12)), (1, slice(12, 14))]


def _inputs(counts, num_arrived, dtype):
    torch.manual_seed(0)
    sources = torch.cat([torch.randperm(num_arrived)[:count] for count in counts])
    arrived, weights = torch.randn(num_arrived, 16, dtype=torch.float64), torch.rand(sum(counts), dtype=torch.float64)
    gate_up, down = (
        torch.randn(len(counts), 24, 16, dtype=torch.float64) / 4,
        torch.randn(len(counts), 16, 12, dtype=torch.float64) / 3,
    )
    return sources, [part.to(dtype).requires_grad_() for part in (arrived, weights, gate_up, down)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("counts", [(30, 0, 7, 1), (0, 0), (40, 33)])
def test_outputs_and_all_gradients_equal_plain_autograd(counts, dtype, limit, monkeypatch):
    monkeypatch.setattr(looped_experts, "MAX_RUN", 32)  # the longest run is cut
    sources, leaves = _inputs(counts, 40, dtype)
    grads = WeightGrads(BufferPool())
    arrived, weights, *matrices = leaves
    sums = LoopedSwiGLU.apply(arrived, weights, *grads.share(*matrices), sources, counts, grads, Meter())
    _, exact = _inputs(counts, 40, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in exact]
    expected = plain_experts(counts, sources, *exact)
    cotangent = torch.randn(40, 16, dtype=torch.float64).to(dtype)
    sums.backward(cotangent)
    if sum(counts):
        expected.backward(cotangent.double())
    for name, got, want in (
        ("sums", sums, expected),
        *((str(i), leaf.grad, other.grad) for i, (leaf, other) in enumerate(zip(leaves, exact, strict=True))),
    ):
        want = torch.zeros_like(got) if want is None else want  # noqa: PLW2901
        assert (got.double() - want).norm() <= limit * want.norm(), name


@pytest.mark.parametrize("hidden", [16, 6])  # computed at once, looped
def test_frozen_experts_cost_no_weight_gradients_and_pass_the_others_on(hidden, monkeypatch):
    monkeypatch.setattr(WeightGrads, "add", lambda *_: pytest.fail("a weight gradient was computed"))
    layer = MoELayer(hidden, MoEConfig(num_experts=4, top_k=2, ffn_hidden=8), LocalDispatcher(4))
    layer.experts.requires_grad_(False)
    x = torch.randn(9, hidden, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any()
    assert layer.router.weight.grad.any()
    assert layer.experts.down_proj.grad is None


@pytest.mark.parametrize("hot", [False, True])
def test_memory_of_a_step_is_what_the_documentation_says(hot):  # P17
    tokens, hidden, inner, experts, top_k = 4096, 128, 64, 16, 4
    config = MoEConfig(num_experts=experts, top_k=top_k, ffn_hidden=inner, num_shared_experts=0)
    layer = MoELayer(hidden, config, LocalDispatcher(experts))
    if hot:
        layer.router.expert_bias_E[:top_k] = 50.0  # four experts get every token, the others none
    x = torch.randn(tokens, hidden, requires_grad=True)
    rows, run = tokens * top_k, min(looped_experts.MAX_RUN, tokens if hot else 2 * tokens * top_k // experts)
    kept, weight_grads = rows * 2 * inner, experts * 3 * inner * hidden
    # docs/performance.md, "Memory": kept activations, weight gradients, six tensors as wide as an arrived row, scratch.
    documented = 4 * (kept + weight_grads + 6 * tokens * hidden + run * (3 * hidden + 4 * inner))
    routing = 8 * tokens * (6 * experts + 10 * top_k)
    peak = peak_allocated_bytes(lambda: layer(x).backward(torch.ones_like(x)))
    assert 0.5 * documented < peak < documented + routing
