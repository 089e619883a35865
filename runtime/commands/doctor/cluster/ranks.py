"""Ranks without a model: they join as those of a training run do, and exchange bytes in their EP groups."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from workers.distributed.parallel import ParallelConfig, RankGroups, join_groups, local_device

SMALL_BYTES = 64  # to each rank
LARGEST_BYTES = 2**24
NUM_SMALL, NUM_LARGE = 20, 10  # The best of these counts: any one may have been held up by something else.
FILL_S = 0.05  # An exchange this long measures the rate.


@dataclass(frozen=True)
class RankSpeed:
    """All-to-all of the EP group of one rank. small_s: seconds of a small one. bytes_per_s: sent to other ranks."""

    device: str
    small_s: float
    bytes_per_s: float


class DoctorRank:
    """A rank; `join` first, then `measure` on all ranks together."""

    def __init__(self, ep_size: int, device: Literal["auto", "cpu", "cuda"]) -> None:
        self._config, self._device = ParallelConfig(ep_size=ep_size), device
        self._groups: RankGroups

    def join(self, *, rank: int, world_size: int, store: Store, timeout_s: float, nodes: tuple[int, ...]) -> None:
        """Form all groups that a run forms, and exercise each."""
        self._groups = join_groups(
            rank=rank,
            world_size=world_size,
            store=store,
            config=self._config,
            device=local_device(self._device),
            timeout_s=timeout_s,
        )

    def measure(self, budget_s: float) -> RankSpeed:
        """Measure the all-to-all of all EP groups at once, as in training. Collective; takes about budget_s at most."""
        groups = self._groups
        small_s = min(self._exchange_s(SMALL_BYTES) for _ in range(NUM_SMALL))
        deadline, num_bytes = time.monotonic() + budget_s, 2**16
        while True:
            # The slowest rank decides for its group, so that all of it go on or all stop.
            taken_s = self._agreed(self._exchange_s(num_bytes))
            late = self._agreed(time.monotonic() + 8 * taken_s - deadline) > 0
            if taken_s >= FILL_S or num_bytes >= LARGEST_BYTES or late:
                break
            num_bytes *= 4
        for _ in range(NUM_LARGE):
            if self._agreed(time.monotonic() + taken_s - deadline) > 0:
                break
            taken_s = min(taken_s, self._agreed(self._exchange_s(num_bytes)))
        return RankSpeed(
            device=str(groups.device.type),
            small_s=self._agreed(small_s),
            bytes_per_s=(groups.ep_size - 1) * num_bytes / taken_s,
        )

    def _exchange_s(self, num_bytes: int) -> float:
        """Seconds of one all-to-all with so many bytes from each rank to each."""
        groups = self._groups
        rows = torch.zeros(groups.ep_size * num_bytes, dtype=torch.uint8, device=groups.device)
        received = torch.empty_like(rows)
        dist.barrier(groups.ep_group)  # the wait for a late rank is no part of the exchange
        self._wait_for_device()
        begun = time.perf_counter()
        dist.all_to_all_single(received, rows, group=groups.ep_group)
        self._wait_for_device()
        return time.perf_counter() - begun

    def _agreed(self, value: float) -> float:
        """The largest value of any rank of the EP group. Collective."""
        largest = torch.tensor([value], dtype=torch.float64, device=self._groups.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._groups.ep_group)
        return largest.item()

    def _wait_for_device(self) -> None:
        if self._groups.device.type == "cuda":
            torch.cuda.synchronize(self._groups.device)
