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


def test_grouped_matmul_in_bf16_is_near_fp32_also_without_rows():
    layer = _layer().cuda()
    for num_tokens in (50, 0):
        x = torch.randn(num_tokens, 64, device="cuda")
        arrived, handle = layer.dispatcher.dispatch(x, *layer.router(x))
        parameters = [getattr(layer.experts, name) for name in EXPERT_WEIGHTS]
        half = grouped_swiglu(arrived.bfloat16(), handle, *(parameter.bfloat16() for parameter in parameters))
        full = layer.experts(arrived, handle)
        assert half.shape == (num_tokens, 64)
        assert (half.float() - full).norm() <= 2e-2 * full.norm()
