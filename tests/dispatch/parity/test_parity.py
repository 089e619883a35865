"""The layer on several ranks, with every exchange and schedule, and alone against the slow reference in one process on
the same global batch: outputs, every gradient, the norm, weights after SGD and after AdamW steps with the bias moving.
"""

import pytest
import torch
import torch.distributed as dist

from dispatch.balance import write_bias
from dispatch.config import MoEConfig
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.local import LocalDispatcher
from dispatch.experts.grouped import grouped_swiglu
from dispatch.experts.stacked import EXPERT_WEIGHTS
from dispatch.layer import MoELayer
from dispatch.parity.cases import CASES
from dispatch.parity.check import check
from dispatch.parity.command import report
from dispatch.parity.layers import VARIANTS, adapter_of
from tests.ranks import run_ranks

HIDDEN = 6


def _rows_on_ranks(rank, world_size, variants):
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    return check(CASES, {variant: adapter_of(variant) for variant in variants}, dist.group.WORLD)


ON_FOUR = ("nodes-of-2", "nodes-in-chunks", "rank-in-rounds")  # what fewer ranks have less of
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "variants"),
    [
        # One rank exchanges nothing, whatever the exchange.
        pytest.param(1, [name for name, variant in VARIANTS.items() if variant.exchange == "rank"], id="1"),
        pytest.param(2, list(VARIANTS), id="2"),
        pytest.param(3, list(VARIANTS), id="3", marks=SLOW),
        pytest.param(4, list(ON_FOUR), id="4"),
        pytest.param(4, [name for name in VARIANTS if name not in ON_FOUR], id="4, the other variants", marks=SLOW),
    ],
)
def test_ranks_equal_one_process(world_size, variants):  # B13, P1, P2, P5, P7, P8
    rows = run_ranks(world_size, _rows_on_ranks, variants, timeout_s=500)[0]
    assert len(rows) == len(CASES) * len(variants)
    assert not any(row.failures for row in rows), report(rows, f"ep {world_size}")


def test_an_expert_without_rows_gets_zero_gradients_and_not_none():  # B13
    layer = MoELayer(HIDDEN, MoEConfig(num_experts=8, top_k=2, ffn_hidden=5), LocalDispatcher(8)).double()
    layer.router.expert_bias_E[3] = -50.0
    layer(torch.randn(20, HIDDEN, dtype=torch.float64)).sum().backward()
    for name in EXPERT_WEIGHTS:
        grad = getattr(layer.experts, name).grad
        assert grad[3].abs().max() == 0
        assert grad[4].abs().max() > 0


def test_grouped_matmul_path_equals_the_loop():
    # The path that CUDA takes in bf16, run here in fp32, where torch's grouped matmul works on CPU too.
    torch.manual_seed(0)
    dispatcher = LocalDispatcher(4)
    layer = MoELayer(16, MoEConfig(num_experts=4, top_k=2, ffn_hidden=8), dispatcher)
    ids = torch.tensor([[0, 2], [2, 0], [3, 2], [2, 0]])  # expert 1 has no row
    results = []
    for path in (
        layer.experts.compute,
        lambda x, handle: grouped_swiglu(x, handle, *layer.experts.parameters(), buffer_pool=BufferPool()),
    ):
        layer.zero_grad()
        torch.manual_seed(1)
        x, weights = torch.randn(4, 16, requires_grad=True), torch.rand(4, 2, requires_grad=True)
        arrived, handle = dispatcher.dispatch(x, ids, weights)
        out = path(arrived, handle)
        out.square().sum().backward()
        grads = [parameter.grad.clone() for parameter in layer.experts.parameters()]
        results.append([out.detach(), x.grad, weights.grad, *grads])
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("small_bytes", [0, 2**30], ids=["looped", "at once"])
def test_bf16_outputs_of_several_experts_are_summed_in_fp32(small_bytes, monkeypatch):
    monkeypatch.setattr("dispatch.experts.grouped.SMALL_BYTES", small_bytes)
    torch.manual_seed(0)
    dispatcher = LocalDispatcher(8)
    experts = MoELayer(16, MoEConfig(num_experts=8, top_k=8, ffn_hidden=8), dispatcher).experts
    x, ids = torch.randn(40, 16).bfloat16(), torch.arange(8).expand(40, 8)
    weights = torch.rand(40, 8)
    together = experts.compute(*dispatcher.dispatch(x, ids, weights))
    alone = [experts.compute(*dispatcher.dispatch(x, ids[:, e : e + 1], weights[:, e : e + 1])) for e in range(8)]
    exact = sum(out.float() for out in alone)
    # As near as one rounding of the sum; summed in bf16 it would be more than twice as far.
    assert (together.float() - exact).norm() <= 1.1 * (exact.bfloat16().float() - exact).norm()


def test_bf16_autocast_stays_near_fp32_and_sends_half_the_bytes():
    torch.manual_seed(0)
    layer = MoELayer(32, MoEConfig(num_experts=8, top_k=2, ffn_hidden=16), LocalDispatcher(8))
    x = torch.randn(40, 32)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    error = (half.float() - full).norm() / full.norm()
    assert 0 < error < 2e-2
    write_bias({"router": layer.router}, torch.zeros(8))
