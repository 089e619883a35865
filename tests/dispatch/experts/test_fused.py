"""The node of the experts on CUDA against plain autograd in float64: ragged, empty, one row, all rows to one expert."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from dispatch.diagnosis.meter import Meter
from dispatch.exchange.dispatcher import DispatchHandle
from dispatch.experts import fused, stacked
from dispatch.experts.fused import fused_swiglu
from dispatch.experts.grouped_matmul import Groups
from dispatch.parity.cases import CASES
from dispatch.parity.check import check
from dispatch.parity.layers import adapter_of
from tests.dispatch.experts.plain_experts import plain_experts
from tests.dispatch.kernels.device import DEVICE, drawn, where_kernels_run

pytestmark = where_kernels_run()


def _inputs(counts, num_arrived, hidden, inner, dtype):
    """Sources, and the four leaves: rows, row weights, gate and up, down."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.cat([torch.randperm(num_arrived, generator=generator)[:count] for count in counts]).to(DEVICE)
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [
        drawn(num_arrived, hidden, dtype=dtype),
        drawn(sum(counts), dtype=wide, seed=1),
        (drawn(len(counts), 2 * inner, hidden, seed=2) / hidden**0.5).to(dtype),
        (drawn(len(counts), hidden, inner, seed=3) / inner**0.5).to(dtype),
    ]
    return sources, [leaf.requires_grad_() for leaf in leaves]


def _fused(counts, sources, arrived, weights, gate_up, down):
    handle = DispatchHandle(list(counts), sources, weights, len(arrived), combine_state=None)
    return fused_swiglu(arrived, handle, gate_up, down, Meter())


def _assert_equal(counts, sources, leaves, limit):
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want, got = plain_experts(counts, sources, *exact), _fused(counts, sources, *leaves)
    cotangent = drawn(*got.shape, dtype=got.dtype, seed=4)
    got.backward(cotangent)
    (want + 0 * sum(leaf.sum() for leaf in exact)).backward(cotangent.double())
    pairs = [(got, want), *((leaf.grad, other.grad) for leaf, other in zip(leaves, exact, strict=True))]
    for name, (mine, other) in zip(("sums", "rows", "weights", "gate_up", "down"), pairs, strict=True):
        assert mine.dtype == (leaves[1].dtype if name == "weights" else leaves[0].dtype)
        assert (mine.double() - other).norm() <= limit * other.norm(), name


@pytest.mark.parametrize(
    ("counts", "num_arrived", "hidden", "inner", "dtype", "limit"),
    [
        ((6, 0, 4, 1), 7, 16, 24, torch.bfloat16, 2e-2),  # ragged, one grouped matmul; an idle expert
        ((0, 7, 0), 7, 24, 40, torch.float32, 1e-6),  # all to one
        ((6, 0, 3), 6, 6, 5, torch.float32, 1e-6),  # more than a few, widths of no grouped matmul: a loop
        ((2, 0, 3), 4, 6, 5, torch.float32, 1e-6),  # few: one launch
        ((0, 1), 1, 6, 5, torch.float64, 1e-14),  # one row
        ((0, 0), 3, 16, 8, torch.bfloat16, 0),  # none
        ((0, 0), 0, 16, 8, torch.float32, 0),
    ],
)
def test_sums_and_all_gradients_equal_plain_autograd(counts, num_arrived, hidden, inner, dtype, limit, monkeypatch):
    monkeypatch.setattr(fused, "FEW_ROWS", 5)
    _assert_equal(counts, *_inputs(counts, num_arrived, hidden, inner, dtype), limit)


def test_gradients_equal_finite_differences():
    sources, leaves = _inputs((2, 0, 1), 2, 3, 2, torch.float64)
    torch.autograd.gradcheck(lambda *inputs: _fused((2, 0, 1), sources, *inputs), leaves, fast_mode=True)


def test_a_graph_that_is_retained_gives_the_same_gradients_again():
    sources, leaves = _inputs((3, 2), 4, 16, 8, torch.float32)
    loss = _fused((3, 2), sources, *leaves).sum()  # whose gradient has stride 0
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, again))
    assert first[0].any()


def test_only_rows_and_what_comes_before_the_activation_are_kept():
    sources, leaves = _inputs((3, 2), 4, 16, 8, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        _fused((3, 2), sources, *leaves)
    floats = [tuple(tensor.shape) for tensor in kept if tensor.is_floating_point()]
    assert floats == [*(tuple(leaf.shape) for leaf in leaves), (5, 16)]  # (R, 2F)


def test_frozen_experts_cost_no_weight_gradients_and_pass_the_others_on(monkeypatch):
    monkeypatch.setattr(Groups, "outer", lambda *_: pytest.fail("a weight gradient was computed"))
    sources, leaves = _inputs((3, 2), 4, 16, 8, torch.float32)
    for matrices in leaves[2:]:
        matrices.requires_grad_(False)
    _fused((3, 2), sources, *leaves).sum().backward()
    assert leaves[0].grad.any()
    assert leaves[1].grad.any()


@pytest.mark.parametrize(("dtype", "name"), [("float64", "expert-without-tokens"), ("bfloat16", "aligned-widths")])
def test_a_layer_on_the_kernels_passes_the_parity_kit(dtype, name, monkeypatch):
    calls = []
    monkeypatch.setattr(stacked, "fused_swiglu", lambda *arguments: calls.append(1) or fused_swiglu(*arguments))
    (case,) = (dataclasses.replace(each, tokens=(2, 0, 0, 1)) for each in CASES if each.name == name)
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        (row,) = check([case], {"rank": adapter_of("rank")}, dist.group.WORLD, dtype=dtype, device=DEVICE)
    finally:
        dist.destroy_process_group()
    assert calls
    assert not row.failures
