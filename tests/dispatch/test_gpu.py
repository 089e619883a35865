"""The same layer on CUDA, on the emulated device too: see docs/testing.md."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dispatch.config import MoEConfig
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.exchange.payload import decode_fp8, encode_fp8
from dispatch.experts.grouped import grouped_swiglu
from dispatch.experts.stacked import EXPERT_WEIGHTS
from dispatch.layer import MoELayer
from dispatch.parity.cases import Case
from dispatch.parity.check import check
from dispatch.parity.command import main
from dispatch.parity.launch import launch
from dispatch.parity.layers import VARIANTS, adapter_of

pytestmark = pytest.mark.gpu

TIMEOUT = timedelta(seconds=120)  # of one collective: the first makes the communicators
# Triton's interpreter takes seconds for a layer of which a device takes a millisecond.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CASES = ["plain", "expert-without-tokens"] if IS_INTERPRETED else ["*"]
KINDS = ["rank", "nodes-in-chunks", "assignment-waiting", "rank-in-rounds"] if IS_INTERPRETED else list(VARIANTS)


def _num_ranks():
    """A device each; 4 serve for all exchanges. With one, the local dispatcher stands for them."""
    return min(4, torch.cuda.device_count())


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
        half = grouped_swiglu(
            arrived.bfloat16(),
            handle,
            *(parameter.bfloat16() for parameter in parameters),
            buffer_pool=layer.experts.buffer_pool,
        )
        full = layer.experts.compute(arrived, handle)
        assert half.shape == (num_tokens, 64)
        assert (half.float() - full).norm() <= 2e-2 * full.norm()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_exchange_and_schedule_passes_the_parity_kit_on_nccl(dtype):  # P30
    ranks = ("--device", "cuda", "--ep", str(_num_ranks()))
    assert main([*ranks, "--dtype", dtype, "--cases", *CASES, "--dispatchers", *KINDS]) == 0


def _grouped_on_rank(group, device):
    """The kit, for every variant in bf16, at sizes that the grouped matmul takes."""
    sizes = {"top_k": 3, "ffn_hidden": 32}
    cases = [
        Case(name="plain", hidden=64, moe=sizes | {"num_shared_experts": 1}),
        Case(name="rank-without-tokens", hidden=64, moe=sizes, tokens=(5, 0, 4, 0)),
        Case(name="expert-without-tokens", hidden=64, moe=sizes, bias=((3, -50.0),)),
        Case(name="all-to-one-expert", hidden=64, moe=sizes | {"top_k": 1}, bias=((5, 50.0),)),
    ]
    adapters = {name: adapter_of(name) for name in KINDS}
    failed = [row for row in check(cases, adapters, group, dtype="bfloat16", device=device) if row.failures]
    assert not failed, [(row.case, row.layer, row.failures[:3]) for row in failed]


def test_grouped_experts_pass_the_parity_kit_in_every_exchange_and_schedule():
    launch(_num_ranks(), "cuda", TIMEOUT, _grouped_on_rank)


def _fp8_on_rank(group, device):
    """Rows that travel coded arrive as they do when coded and decoded before, and gradients are not coded."""
    torch.manual_seed(dist.get_rank(group))
    x, ids = torch.randn(40, 256, device=device, dtype=torch.bfloat16), torch.rand(40, 8).argsort(1)[:, :3].to(device)
    found = []
    for payload, rows in (("fp8", x), ("compute", decode_fp8(encode_fp8(x), 256, x.dtype))):
        sent = rows.detach().requires_grad_()
        dispatcher = AllToAllDispatcher(8, group, payload=payload)
        arrived, handle = dispatcher.dispatch(sent, ids, torch.ones(40, 3, device=device))
        dispatcher.combine(arrived * arrived, handle).float().sum().backward()
        found.append((arrived.detach(), sent.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_fp8_rows_travel_over_nccl_as_what_they_decode_to():
    launch(_num_ranks(), "cuda", TIMEOUT, _fp8_on_rank)


def test_fp8_codes_are_those_of_the_cpu():
    rows = torch.randn(300, 200, dtype=torch.float64).bfloat16() * torch.logspace(-12, 3, 300).unsqueeze(1).bfloat16()
    assert torch.equal(encode_fp8(rows.cuda()).cpu(), encode_fp8(rows))


def test_a_layer_waits_for_the_device_in_its_plan_and_nowhere_else():
    layer = _layer().cuda()
    x = torch.randn(100, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        layer(x).float().sum().backward()  # what is built once may wait
        planned = layer.dispatcher.plan(layer.router(x)[0])
        layer.dispatcher.plan = lambda *_: planned
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).float().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
