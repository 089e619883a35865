"""One rank of the measured rounds: it joins a gang of Ray actors, as a training worker does."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from dispatch.laws import Law, LawState
from runtime.commands.bench.coordinator.case import NUM_SUMS, ControlCase, counts_of, summed_bytes
from runtime.commands.bench.coordinator.load import NUM_WARM_UP, RUN_ID
from runtime.terminal.quantities import counted
from workers.control.loop import ControlLoop

LIMIT_S = 120.0
# From a message that costs its latency alone to one that costs its bytes: the model is fitted to both.
HOP_BYTES = (64, 1 << 10, 1 << 14, 1 << 17, 1 << 20)
PHASES = ("reduce", "coordinator", "broadcast")


@dataclass(frozen=True)
class RoundSamples:
    """Samples for one world size. seconds: from counts to new bias, on the slowest rank. phases: seconds on rank 0."""

    world_size: int
    seconds: list[float]
    phases: dict[str, list[float]]


@dataclass(frozen=True)
class RankFigures:
    """Everything that was measured between ranks. hop_s: samples of one hop by its bytes; empty for one rank."""

    rounds: list[RoundSamples]
    hop_s: dict[int, list[float]]


class BenchRank:
    """A rank of the measurement. Call `join`, then `measure` on all ranks together; `progress` at any time."""

    def __init__(self) -> None:
        self._doing = "joining"

    def join(self, *, rank: int, world_size: int, store: Store, timeout_s: float, nodes: tuple[int, ...]) -> None:
        """Become a rank of the world."""
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)

    def progress(self) -> str:
        """Say what is measured now."""
        return self._doing

    def measure(self, case: ControlCase, coordinator: Callable[[bytes], bytes]) -> RankFigures | None:
        """Collective; rank 0 returns the figures."""
        law, rounds = case.make_law(), []
        for world_size in case.world_sizes:
            self._doing = f"rounds of {counted(world_size, 'rank')}"
            group = dist.new_group(list(range(world_size)))
            if dist.get_rank() < world_size:
                rounds.append(_measure_rounds(group, law, coordinator, case.rounds))
            dist.barrier()  # ranks without a part wait here, and take no core from the others
        self._doing = "hops between two ranks"
        sizes = sorted({*HOP_BYTES, summed_bytes(law, 2)})
        hop_s = {size: _measure_hops(size, case.rounds) for size in sizes} if case.workers > 1 else {}
        dist.barrier()
        return RankFigures(rounds, hop_s) if dist.get_rank() == 0 else None


def _measure_rounds(
    group: dist.ProcessGroup, law: Law, coordinator: Callable[[bytes], bytes], num_rounds: int
) -> RoundSamples:
    live_N = torch.zeros(law.layout.total)

    def write(state: LawState) -> None:
        live_N.copy_(state.bias_N)

    sums, floats = torch.zeros(NUM_SUMS, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    maxima = torch.zeros(len(law.layout.names), dtype=torch.int64)
    seconds, phases = [], []
    loop = ControlLoop(
        group=group, law=law, run_id=RUN_ID, read_bias=live_N.clone, write_state=write, coordinator=coordinator,
        timeout_s=LIMIT_S,
    )  # fmt: skip
    with loop:
        for step in range(NUM_WARM_UP + num_rounds):
            counts_M = counts_of(law, step)
            dist.barrier(group)  # a rank that is late with its counts is no cost of the control path
            began = time.perf_counter()
            loop.begin_step(step, counts_M, sums, floats, maxima)
            control = loop.finish_step(apply=True)
            seconds.append(time.perf_counter() - began)
            phases.append(control.round_s)
            if control.events:
                raise RuntimeError(f"the coordinator did not answer step {step}: {control.events[0]['reason']}")
    # A step goes on when its last rank has the bias.
    slowest = torch.tensor(seconds[NUM_WARM_UP:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    samples = {phase: [each.get(phase, 0.0) for each in phases[NUM_WARM_UP:]] for phase in PHASES}
    return RoundSamples(dist.get_world_size(group), slowest.tolist(), samples)


def _measure_hops(num_bytes: int, num_rounds: int) -> list[float]:
    """Seconds of one hop between ranks 0 and 1: half a round trip. Each receiver also adds what arrives."""
    mine = torch.zeros(-(-num_bytes // 8), dtype=torch.int64)
    arrived = torch.zeros_like(mine)
    seconds = []
    for _ in range(NUM_WARM_UP + num_rounds):
        began = time.perf_counter()
        for turn in range(2):
            if dist.get_rank() == turn:
                dist.send(mine, 1 - turn)
            elif dist.get_rank() == 1 - turn:
                dist.recv(arrived, turn)
                mine += arrived
        seconds.append((time.perf_counter() - began) / 2)
    return seconds[NUM_WARM_UP:]
