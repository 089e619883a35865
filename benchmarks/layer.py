"""Time one MoE layer, forward and backward, beside the matmuls that it cannot do without.

    python -m benchmarks.layer                                        one process
    torchrun --nproc-per-node 2 -m benchmarks.layer --shapes fine     two EP ranks on this machine

Every sample has fresh tokens, so that the rows per expert change as in training. The candidates take turns (A B C, C B
A), and ratios are taken inside a round, so that the machine's noise hits all of them alike. The limit is the six
matmuls of every expert on balanced rows in contiguous memory, without routing, exchange, activation or autograd.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.local import LocalDispatcher
from dispatch.exchange.placement import ExpertPlacement
from dispatch.experts import looped as looped_experts
from dispatch.layer import MoELayer
from runtime.commands.bench.dispatch.limits import Shape, matmul_limit

Candidate: TypeAlias = Callable[[Tensor], None]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

SHAPES = {
    "tiny": Shape(256, 256, 256, 16, 2),
    "small": Shape(2048, 192, 128, 16, 4),  # the default training run, per worker
    "coarse": Shape(4096, 512, 1024, 16, 2),
    "mid": Shape(4096, 512, 512, 64, 6),
    "fine": Shape(4096, 512, 256, 64, 8),
}


class ModuleLoop(nn.Module):
    """The layer as it is often first written: E modules, a Python loop, index_add. One process only."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.router = layer.router
        weights = (*layer.experts.gate_up_proj.chunk(2, dim=1), layer.experts.down_proj)
        self.experts = nn.ParameterList(nn.Parameter(part.detach()) for weight in weights for part in weight)

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, hidden) to (T, hidden)."""
        ids_TK, weights_TK = self.router(x_TH)
        y_TH, num_experts = torch.zeros_like(x_TH), self.router.num_experts
        for expert in range(num_experts):
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            gate, up, down = (self.experts[which * num_experts + expert] for which in range(3))
            rows = x_TH[token]
            out = (F.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()
            y_TH = y_TH.index_add(0, token, out * weights_TK[token, slot, None].to(out.dtype))
        return y_TH


def step_of(layer: nn.Module, dtype: torch.dtype) -> Candidate:
    """Forward and backward of a layer with parameters in `dtype`; the gate stays fp32."""
    layer.to(dtype)

    def run(x: Tensor) -> None:
        layer.zero_grad(set_to_none=True)
        y = layer(x.to(dtype).requires_grad_())
        y.backward(torch.ones_like(y))

    return run


def measure(
    candidates: dict[str, Candidate], shape: Shape, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(-1, rounds):  # one to warm up
        x = torch.randn(shape.tokens, shape.hidden)
        for name in list(candidates)[:: 1 if round_index % 2 else -1]:
            if dist.is_initialized():
                dist.barrier()
            began = clock()
            candidates[name](x)
            if round_index >= 0:
                seconds[name].append(clock() - began)
    return seconds


class FreshMemory(BufferPool):
    """A pool that reuses nothing: every tensor is new."""

    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See `BufferPool.empty`."""
        return like.new_empty(shape, dtype=dtype or like.dtype)


def with_constant(step: Candidate, name: str, value: int) -> Candidate:
    """The same step while a constant of `dispatch.experts.looped` has another value."""

    def run(x: Tensor) -> None:
        kept = getattr(looped_experts, name)
        setattr(looped_experts, name, value)
        try:
            step(x)
        finally:
            setattr(looped_experts, name, kept)

    return run


def candidates_of(shape: Shape, dtype: torch.dtype, world_size: int, *, choices: bool) -> dict[str, Candidate]:
    """The candidates by name, first the limit, to which ratios are taken.

    choices: also the layer without each of its optimisations.
    """
    config = MoEConfig(
        num_experts=shape.num_experts, top_k=shape.top_k, ffn_hidden=shape.ffn_hidden, num_shared_experts=0
    )
    placement = ExpertPlacement(shape.num_experts, world_size)
    limit = matmul_limit(shape, placement.num_local_experts[0], world_size, dtype)

    def step(schedule: ScheduleConfig | None = None, **how: Any) -> Candidate:
        kind = AllToAllDispatcher if world_size > 1 else LocalDispatcher
        group = (dist.group.WORLD,) if world_size > 1 else ()
        return step_of(MoELayer(shape.hidden, config, kind(shape.num_experts, *group, **how), schedule), dtype)

    found = {"matmul limit": limit, "trimtab": step()}
    if choices:
        found["fresh memory"] = step(buffer_pool=FreshMemory())
        found["3 chunks"] = step(ScheduleConfig(num_chunks=3))
    if choices and dtype == torch.bfloat16:
        found["rows not padded"] = with_constant(step(), "BF16_ROWS", 1)
    if world_size > 1:
        found["row per expert"] = step(per_assignment=True)
    else:
        layer = MoELayer(shape.hidden, config, LocalDispatcher(shape.num_experts))
        found["module loop"] = step_of(ModuleLoop(layer), dtype)
    return found


def main() -> None:
    """Print a line a candidate: median milliseconds and the median ratio to the limit, with its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, in all its threads")
    parser.add_argument("--profile", action="store_true", help="the time of torch's operators in one step, each alone")
    parser.add_argument("--choices", action="store_true", help="also the layer without each of its optimisations")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for name in arguments.shapes:
        for dtype in (getattr(torch, each) for each in arguments.dtypes):
            candidates = candidates_of(SHAPES[name], dtype, world_size, choices=arguments.choices)
            seconds = measure(candidates, SHAPES[name], arguments.rounds, CLOCKS[arguments.clock])
            lines = profile_of(candidates["trimtab"], SHAPES[name]) if arguments.profile else []
            if not dist.is_initialized() or dist.get_rank() == 0:
                show(f"{name} {str(dtype).removeprefix('torch.')}, EP {world_size}", seconds)
                print("\n".join(lines))
    if dist.is_initialized():
        dist.destroy_process_group()


def profile_of(step: Candidate, shape: Shape) -> list[str]:
    """The 12 operators that take most time in one step, each without the operators that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(torch.randn(shape.tokens, shape.hidden))
    slowest = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:12]
    return [f"  {e.key[:34]:34} {e.self_cpu_time_total / 1e3:9.1f} ms in {e.count:5} calls" for e in slowest]


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """Print the results of one shape."""
    limit = seconds["matmul limit"]
    print(f"{title}  ({SHAPES[title.split()[0]]})")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, limit, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"  {name:18} {1e3 * statistics.median(values):9.1f} ms   {statistics.median(ratios):5.2f} x limit "
            f"({spread})"
        )


if __name__ == "__main__":
    main()
