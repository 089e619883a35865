"""A layer with copies of hot experts beside the same layer without, in pairs; or what copies do at 256 ranks, computed.

    python -m benchmarks.expert_copies [--workload W1] [--workers 4] [--pairs 20]
    python -m benchmarks.expert_copies --simulate [--workload W1] [--workers 256]

Each gloo rank holds the layer twice, without and with copies. Both make the same steps, and the one that goes first
alternates: forward, backward and the optimizer of the experts, with copies also the gradients to the owners and the
weights to the copies. Copies are placed by the loads of a step before. CPU seconds are those of the rank that takes
most, its sending and receiving included.
"""

import argparse
import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from dispatch.config import MoEConfig
from dispatch.copies import LayerCopies
from dispatch.exchange.expert_copies import ExpertCopies, place_copies
from dispatch.exchange.factory import make_dispatcher
from dispatch.exchange.placement import ExpertPlacement
from dispatch.layer import MoELayer
from dispatch.parity.launch import launch
from dispatch.parity.workloads import Workload, tokens_that_choose

WARM_UP = 2
TIMEOUT = timedelta(seconds=600)  # of one collective
HIDDEN, FFN_HIDDEN, NUM_EXPERTS, TOP_K, NUM_TOKENS = 256, 256, 64, 8, 1024
# The simulation has the layer of DeepSeek-V3 (arXiv 2412.19437), bf16 on the wire at 50 GB/s, 400 TFLOP/s for matmuls.
SIMULATED = {"hidden": 7168, "ffn_hidden": 2048, "num_experts": 256, "top_k": 8, "num_tokens": 4096}
LINK_BYTES_PER_S, FLOPS_PER_S, BYTES = 50e9, 400e12, 2


class _Side:
    """One of the two layers, its optimizer and its measured seconds."""

    def __init__(self, workload: Workload, copies_per_rank: int, group: dist.ProcessGroup) -> None:
        torch.manual_seed(dist.get_rank())
        dispatcher = make_dispatcher(NUM_EXPERTS, group, hidden=HIDDEN, top_k=TOP_K, exchange="rank")
        self.layer = MoELayer(
            HIDDEN, MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, ffn_hidden=FFN_HIDDEN), dispatcher
        )
        dist.broadcast(self.layer.router.weight.data, 0)
        self.router_EH = self.layer.router.weight.detach().clone()
        # Of the experts alone: a router that does not change keeps making the choices of the workload.
        self.optimizer = torch.optim.AdamW(self.layer.experts.parameters(), lr=1e-4)
        self.copies = LayerCopies(self.layer) if copies_per_rank else None
        if self.copies:
            self.copies.place(place_copies(_loads(workload, step=0), workload.ep_size, copies_per_rank))
            self._send()
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def _send(self) -> None:
        for pending in self.copies.send_weights() if self.copies else ():
            pending.wait()

    def step(self, x_TH: torch.Tensor, grad_TH: torch.Tensor) -> None:
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        self.layer(x_TH.clone().requires_grad_()).backward(grad_TH)
        if self.copies:
            self.copies.sum_gradients()
        self.optimizer.step()
        self._send()
        self.layer.zero_grad(set_to_none=True)
        cpu_s = time.process_time() - cpu
        dist.barrier()
        seconds = torch.tensor([time.perf_counter() - wall, cpu_s], dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.wall_s.append(float(seconds[0]))
        self.cpu_s.append(float(seconds[1]))


def measure(
    group: dist.ProcessGroup, _device: torch.device, workload: Workload, copies_per_rank: int, num_pairs: int
) -> dict[str, list[float]]:
    """Wall and CPU seconds of the steps of both sides, of the slowest rank."""
    torch.set_num_threads(1)
    sides = [_Side(workload, copies, group) for copies in (0, copies_per_rank)]
    for pair in range(WARM_UP + num_pairs):
        ids_TK = workload.route(group.rank(), pair + 1)
        x_TH = tokens_that_choose(ids_TK, sides[0].router_EH, seed=pair * group.size() + group.rank())
        grad_TH = torch.randn(x_TH.shape)
        for side in sides if pair % 2 else reversed(sides):
            side.step(x_TH, grad_TH)
    without, with_copies = sides
    return {
        "wall without": without.wall_s[WARM_UP:],
        "wall with": with_copies.wall_s[WARM_UP:],
        "cpu without": without.cpu_s[WARM_UP:],
        "cpu with": with_copies.cpu_s[WARM_UP:],
    }


def _loads(workload: Workload, step: int) -> list[int]:
    loads_E = torch.zeros(workload.num_experts, dtype=torch.int64)
    for rank in range(workload.ep_size):
        ids = workload.route(rank, step).flatten()
        loads_E += torch.bincount(ids, minlength=workload.num_experts)
    return [int(load) for load in loads_E]


def _print_pairs(seconds: dict[str, list[float]]) -> None:
    for clock in ("wall", "cpu"):
        without, with_copies = seconds[f"{clock} without"], seconds[f"{clock} with"]
        ratios = sorted(one / other for one, other in zip(with_copies, without, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        medians = [f"{statistics.median(values) * 1e3:.0f} ms" for values in (without, with_copies)]
        print(
            f"{clock}: {medians[0]} without, {medians[1]} with copies; of pairs the median is "
            f"{statistics.median(ratios):.3f} (quartiles {low:.3f}, {high:.3f})"
        )


def _simulate(workload: Workload, copies_per_rank: int) -> None:
    """Print the busiest rank's seconds of matmuls in a step of one layer, and of sending copies."""
    before, now = _loads(workload, step=0), _loads(workload, step=1)
    weights = 3 * SIMULATED["hidden"] * SIMULATED["ffn_hidden"]
    mean_s = sum(now) / workload.ep_size * 3 * 2 * weights / FLOPS_PER_S
    for copies in (0, *range(1, copies_per_rank + 1)):
        placed = place_copies(before, workload.ep_size, copies, ranks_per_node=min(8, workload.ep_size))
        sent, busiest = _most_sent(placed), placed.busiest(now)
        wire_s = 2 * sent * weights * BYTES / LINK_BYTES_PER_S
        print(
            f"at most {copies} a rank: {placed.num_copies} copies, busiest rank {busiest:.2f} of the mean, matmuls "
            f"{busiest * mean_s * 1e3:.0f} ms; {wire_s * 1e3:.0f} ms for {sent} experts on the busiest wire"
        )


def _most_sent(placed: ExpertCopies) -> int:
    """The most copies that one rank sends weights to, or receives weights for."""
    size = placed.placement.ep_size
    held = [placed.copies_on(rank) for rank in range(size)]
    served = [
        sum(expert in placed.placement.owned_by(rank) for each in held for expert in each) for rank in range(size)
    ]
    return max(*served, *map(len, held))


def main() -> int:
    """Measure or compute, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="W1", help="of dispatch.parity.workloads (%(default)s)")
    parser.add_argument("--skew", type=float, help="load of a hot expert over the mean (as the workload has it)")
    parser.add_argument("--workers", type=int, default=4, help="ranks of the EP group (%(default)s)")
    parser.add_argument("--copies", type=int, default=2, help="copies a rank, at most (%(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs that are timed (%(default)s)")
    parser.add_argument("--simulate", action="store_true", help="compute instead of measuring")
    options = parser.parse_args()
    sizes = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "num_tokens": NUM_TOKENS}
    if options.simulate:
        sizes = {name: SIMULATED[name] for name in sizes}
    workload = Workload(name=options.workload, skew=options.skew, ep_size=options.workers, **sizes)
    loads_E = _loads(workload, step=0)
    busiest = ExpertCopies(ExpertPlacement(len(loads_E), options.workers)).busiest(loads_E)
    print(
        f"{options.workload}, {options.workers} ranks, {len(loads_E)} experts: busiest rank {busiest:.2f} of the mean"
    )
    if options.simulate:
        _simulate(workload, options.copies)
    else:
        _print_pairs(launch(options.workers, "cpu", TIMEOUT, measure, workload, options.copies, options.pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
