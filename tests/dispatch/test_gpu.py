"""The same layer on CUDA. Written against the CPU results, and not yet run: see docs/testing.md."""

import copy

import pytest
import torch

from dispatch.dispatcher import LocalDispatcher
from dispatch.experts import EXPERT_WEIGHTS, grouped_swiglu
from dispatch.layer import MoEConfig, MoELayer

pytestmark = pytest.mark.gpu


def _layer():
    torch.manual_seed(0)
    return MoELayer(64, MoEConfig(num_experts=8, top_k=2, ffn_hidden=32), LocalDispatcher(8))


def test_cuda_equals_cpu_in_fp32():
    layer = _layer()
    on_cuda = copy.deepcopy(layer).cuda()
    x = torch.randn(100, 64)
    x_cuda = x.cuda().requires_grad_()
    x.requires_grad_()
    y, y_cuda = layer(x), on_cuda(x_cuda)
    torch.testing.assert_close(y_cuda.cpu(), y, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    y_cuda.square().sum().backward()
    torch.testing.assert_close(x_cuda.grad.cpu(), x.grad, rtol=1e-3, atol=1e-4)
    assert torch.equal(on_cuda.router.tokens_per_expert_E.cpu(), layer.router.tokens_per_expert_E)


def test_grouped_matmul_in_bf16_has_no_use_for_rows_that_are_not_there():
    layer = _layer().cuda()
    counts = [5, 0, 7, 0, 0, 1, 3, 0]
    rows, weights = torch.randn(16, 64, device="cuda"), torch.rand(16, device="cuda")
    parameters = [getattr(layer.experts, name) for name in EXPERT_WEIGHTS]
    half = grouped_swiglu(rows.bfloat16(), counts, weights, *(parameter.bfloat16() for parameter in parameters))
    full = layer.experts(rows, counts, weights)
    assert (half.float() - full).norm() / full.norm() < 2e-2
    empty = grouped_swiglu(
        rows[:0].bfloat16(), [0] * 8, weights[:0], *(parameter.bfloat16() for parameter in parameters)
    )
    assert empty.shape == (0, 64)
