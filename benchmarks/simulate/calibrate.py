"""Measures the rates of one core of this machine: matmuls at the shapes of a model, passes over memory, gloo.

It measures CPU time, as `barrier_clock` does for steps, so that other programs do not change the result.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.commands.bench.dispatch.limits import Shape, matmul_flops, matmul_limit
from runtime.commands.plan.activations import FP32
from runtime.commands.plan.simulate.hardware import Hardware, LinkCost
from runtime.commands.plan.simulate.work import ATTENTION_BACKWARD, added, norm, swiglu
from workers.actor import usable_cores
from workers.model.model_config import ModelConfig

SAMPLES = 3
NO_LINK = LinkCost(alpha_s=0.0, bytes_per_s=1e12)  # for one rank, which sends nothing
COLD_SETS = 12  # sets of tensors used in turn, so that none is in the cache
LARGE_BYTES = 16 * 2**20


def seconds_of(call: Callable[[], object], samples: int = SAMPLES) -> float:
    """The median CPU seconds of a call, after one call to warm up."""
    call()
    found = []
    for _ in range(samples):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return statistics.median(found)


def rates_of(model: ModelConfig, sequences: int, ep_size: int) -> Hardware:
    """The rates for this model with `sequences` sequences on a rank, measured on one core; without links and host_s."""
    tokens = sequences * model.max_seq_len
    return Hardware(
        name="this machine",
        dense_flops_per_s=dense_rate(model, tokens),
        grouped_flops_per_s=grouped_rate(model, tokens, ep_size),
        attention_flops_per_s=attention_rate(model, sequences),
        memory_bytes_per_s=memory_rate(model, tokens),
        update_s=update_seconds(model, ep_size),
        node=NO_LINK,
        network=NO_LINK,
        control=NO_LINK,
        cores=usable_cores(),
    )


def dense_rate(model: ModelConfig, tokens: int) -> float:
    """FLOP/s of the dense matmuls of a layer, forward and backward."""
    hidden, width = model.hidden, model.num_heads * model.head_width
    shapes = [(hidden, 3 * width), (width, hidden), (hidden, model.dense_ffn_hidden), (model.dense_ffn_hidden, hidden)]
    seconds = flops = 0.0
    for inner, outer in shapes:
        x, weight, grad = torch.randn(tokens, inner), torch.randn(outer, inner), torch.randn(tokens, outer)
        seconds += seconds_of(lambda x=x, weight=weight, grad=grad: (x @ weight.T, grad @ weight, grad.T @ x))  # type: ignore[misc]
        flops += 6 * tokens * inner * outer
    return flops / seconds


def grouped_rate(model: ModelConfig, tokens: int, ep_size: int) -> float:
    """FLOP/s of the experts' six matmuls, one expert after the other."""
    moe = model.moe
    shape = Shape(tokens, model.hidden, moe.ffn_hidden, moe.num_experts, moe.top_k)
    local = 4  # enough for the rate
    run = matmul_limit(shape, local, ep_size, torch.float32)
    rows = local * shape.rows_per_expert(ep_size)
    return matmul_flops(rows, model.hidden, moe.ffn_hidden) / seconds_of(lambda: run(torch.empty(0)))


def attention_rate(model: ModelConfig, sequences: int) -> float:
    """FLOP/s of causal attention; operations are counted as the simulation counts them."""
    sizes = (sequences, model.num_heads, model.max_seq_len, model.head_width)
    queries, keys, values = (torch.randn(sizes, requires_grad=True) for _ in range(3))
    grad = torch.randn(sizes)
    seconds = seconds_of(lambda: F.scaled_dot_product_attention(queries, keys, values, is_causal=True).backward(grad))
    flops = 2 * sequences * model.max_seq_len * model.num_heads * 2 * model.head_width * model.max_seq_len / 2
    return (1 + ATTENTION_BACKWARD) * flops / seconds


def memory_rate(model: ModelConfig, tokens: int) -> float:
    """Bytes/s of a norm, a SwiGLU and a residual sum, forward and backward; bytes are counted as in the simulation.

    It uses one set of tensors after the other, as a step goes from layer to layer, so that none is in the cache.
    """
    hidden, inner = model.hidden, model.dense_ffn_hidden
    normed, widths = nn.RMSNorm(hidden), (hidden, hidden, inner, inner)
    sets = [[torch.randn(tokens, width, requires_grad=True) for width in widths] for _ in range(COLD_SETS)]
    grad, inner_grad = torch.randn(tokens, hidden), torch.randn(tokens, inner)

    def passes() -> None:
        for x, branch, gate, up in sets:
            x.grad = branch.grad = gate.grad = up.grad = None
            (normed(x) + branch).backward(grad)
            (F.silu(gate) * up).backward(inner_grad)

    counted = norm(tokens * hidden, FP32) + added(tokens * hidden, FP32) + swiglu(tokens * inner, FP32)
    moved = counted.forward.passed_bytes + counted.backward.passed_bytes
    return COLD_SETS * moved / seconds_of(passes)


def update_seconds(model: ModelConfig, ep_size: int) -> float:
    """Seconds for each parameter element: the norm of the gradients, clipping, AdamW, and memory for a new gradient.

    A step drops its gradients, so that the next step writes its gradients to new pages of memory.
    """
    local, hidden, inner = model.moe.num_experts // ep_size, model.hidden, model.moe.ffn_hidden
    shapes = [(local, 2 * inner, hidden), (local, hidden, inner)] * model.num_moe_layers
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)  # as workers.training.adamw
    written = [torch.empty(shape) for shape in shapes]

    def update() -> None:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_norm(gradients, 2, torch.float64)  # noqa: SLF001 - as workers.training.gradients does
        torch._foreach_mul_(gradients, 0.999)
        optimizer.step()
        optimizer.zero_grad()

    # Less the writing itself, which the time of the matmuls that make gradients includes.
    seconds = seconds_of(update) - seconds_of(lambda: [each.fill_(1e-3) for each in written])
    return seconds / sum(parameter.numel() for parameter in parameters)


def link_of(group: dist.ProcessGroup) -> tuple[LinkCost, float]:
    """The gloo link between all ranks of `group`, and how much longer a sum takes than an all-to-all. Collective.

    The constant cost of a message is left out: `host_s`, measured in steps with messages, includes it.
    """
    size = dist.get_world_size(group)
    sent, received = (torch.zeros(LARGE_BYTES, dtype=torch.uint8) for _ in range(2))
    exchange_s = seconds_of(lambda: dist.all_to_all_single(received, sent, group=group), 3 * SAMPLES)
    flat = torch.zeros(LARGE_BYTES // FP32)
    sum_s = seconds_of(lambda: dist.all_reduce(flat, group=group), 3 * SAMPLES)
    # A ring sends twice as much as an all-to-all.
    return LinkCost(alpha_s=0.0, bytes_per_s=LARGE_BYTES * (size - 1) / size / exchange_s), sum_s / (2 * exchange_s)
