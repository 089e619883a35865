"""Time one MoE layer, forward and backward, beside the matmuls that it cannot do without.

    python -m benchmarks.layer                                        one process
    torchrun --nproc-per-node 2 -m benchmarks.layer --shapes fine     two EP ranks on this machine

Every sample has fresh tokens, so that the rows per expert change as in training. The candidates take turns (A B C, C B
A) and ratios are taken inside a round: the machine's noise hits all of them alike. The limit is the six matmuls of
every expert on balanced rows that lie ready, without routing, exchange, activation or autograd.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.all_to_all import AllToAllDispatcher
from dispatch.dispatcher import Dispatcher, LocalDispatcher
from dispatch.layer import MoEConfig, MoELayer
from dispatch.placement import ExpertPlacement
from runtime.bench.limits import Shape, matmul_limit

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


def step_of(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """Forward and backward of a layer with parameters in `dtype`; the gate stays fp32."""
    layer.to(dtype)

    def run(x: Tensor) -> None:
        layer.zero_grad(set_to_none=True)
        y = layer(x.to(dtype).requires_grad_())
        y.backward(torch.ones_like(y))

    return run


def measure(candidates: dict[str, Callable[[Tensor], None]], shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(-1, rounds):  # one to warm up
        x = torch.randn(shape.tokens, shape.hidden)
        for name in list(candidates)[:: 1 if round_index % 2 else -1]:
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            candidates[name](x)
            if round_index >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def candidates_of(shape: Shape, dtype: torch.dtype, world_size: int) -> dict[str, Callable[[Tensor], None]]:
    """The limit first: ratios are to it."""
    config = MoEConfig(
        num_experts=shape.num_experts, top_k=shape.top_k, ffn_hidden=shape.ffn_hidden, num_shared_experts=0
    )
    placement = ExpertPlacement(shape.num_experts, world_size)
    limit = matmul_limit(shape, placement.num_local_experts[0], world_size, dtype)
    if world_size > 1:
        dispatchers: dict[str, Dispatcher] = {
            "row per rank": AllToAllDispatcher(shape.num_experts, dist.group.WORLD),
            "row per expert": AllToAllDispatcher(shape.num_experts, dist.group.WORLD, per_assignment=True),
        }
        layers = {name: MoELayer(shape.hidden, config, dispatcher) for name, dispatcher in dispatchers.items()}
        return {"matmul limit": limit} | {name: step_of(layer, dtype) for name, layer in layers.items()}
    layer = MoELayer(shape.hidden, config, LocalDispatcher(shape.num_experts))
    return {
        "matmul limit": limit,
        "trimtab": step_of(layer, dtype),
        "module loop": step_of(ModuleLoop(layer), dtype),
    }


def main() -> None:
    """Print a line a candidate: median milliseconds and the median ratio to the limit, with its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for name in arguments.shapes:
        for dtype in (getattr(torch, each) for each in arguments.dtypes):
            seconds = measure(candidates_of(SHAPES[name], dtype, world_size), SHAPES[name], arguments.rounds)
            if not dist.is_initialized() or dist.get_rank() == 0:
                show(f"{name} {str(dtype).removeprefix('torch.')}, EP {world_size}", seconds)
    if dist.is_initialized():
        dist.destroy_process_group()


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """Print the results of one shape."""
    limit = seconds["matmul limit"]
    print(f"{title}  ({SHAPES[title.split()[0]]})")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, limit, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"  {name:14} {1e3 * statistics.median(values):9.1f} ms   {statistics.median(ratios):5.2f} x limit "
            f"({spread})"
        )


if __name__ == "__main__":
    main()
