"""Sums over all ranks along a binomial tree: ceil(log2 W) hops up and as many down, where a ring makes 2 (W - 1).

Rank r hands the sums of its subtree to the rank that lacks r's lowest set bit, and hears the totals from there. A hop
carries all tensors in one message, so that a step pays each hop's latency once.
"""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TAG = 7  # no other messages between two ranks travel in this group


def tree_all_reduce(sums: Sequence[Tensor], maxima: Tensor, *, group: dist.ProcessGroup, async_op: bool) -> "Reduction":
    """Sum tensors, and take the largest of others, over all ranks of a gloo group, in place.

    Args:
        sums, maxima: contiguous, on the CPU, int64 or float64, of shapes and dtypes that are the same on all ranks. A
            sum of floats is made in an order that depends on the world size alone.
        async_op: whether to leave it to the caller to `wait`; the messages travel only while it does.

    Collective.
    """
    reduction = Reduction(sums, maxima, group)
    if not async_op:
        reduction.wait()
    return reduction


class Reduction:
    """One reduction, made by `wait`. num_messages, num_bytes: what this rank sent."""

    def __init__(self, sums: Sequence[Tensor], maxima: Tensor, group: dist.ProcessGroup) -> None:
        self.num_messages = self.num_bytes = 0
        self._group, self._rank, self._world_size = group, dist.get_rank(group), dist.get_world_size(group)
        self._tensors, self._num_sums = [*sums, maxima], len(sums)
        self._sizes = [tensor.nbytes for tensor in self._tensors]
        self._deadline: float | None = None
        self._is_done = False

    def wait(self, timeout: timedelta | None = None) -> None:
        """Make the hops of this rank. Raises RuntimeError where a neighbour does not come in time or is gone."""
        self._deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
        whole = torch.cat([tensor.flatten().view(torch.uint8) for tensor in self._tensors])
        parts = self._parts(whole)
        children, parent = _relatives(self._rank, self._world_size)
        theirs = torch.empty_like(whole)
        for child in children:
            self._receive(theirs, child)
            for index, (mine, other) in enumerate(zip(parts, self._parts(theirs), strict=True)):
                mine.add_(other) if index < self._num_sums else torch.maximum(mine, other, out=mine)
        if parent is not None:
            self._finish([self._send(whole, parent)])
            self._receive(whole, parent)
        self._finish([self._send(whole, child) for child in reversed(children)])  # the largest subtree first
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
        self._is_done = True

    def is_completed(self) -> bool:
        """Whether the totals are there."""
        return self._is_done

    def _parts(self, whole: Tensor) -> list[Tensor]:
        return [part.view(tensor.dtype) for part, tensor in zip(whole.split(self._sizes), self._tensors, strict=True)]

    def _send(self, whole: Tensor, rank: int) -> Any:
        self.num_messages += 1
        self.num_bytes += whole.nbytes
        return dist.isend(whole, group=self._group, group_dst=rank, tag=TAG)

    def _receive(self, whole: Tensor, rank: int) -> None:
        self._finish([dist.irecv(whole, group=self._group, group_src=rank, tag=TAG)])

    def _finish(self, works: Sequence[Any]) -> None:
        for work in works:
            if self._deadline is None:
                work.wait()
            else:  # at least a millisecond, because torch reads 0 as "no limit"
                work.wait(timedelta(seconds=max(self._deadline - time.monotonic(), 0.001)))


def _relatives(rank: int, world_size: int) -> tuple[list[int], int | None]:
    """The children of a rank, that of the smallest subtree first, and its parent."""
    children, bit = [], 1
    while bit < world_size and not rank & bit:
        if rank + bit < world_size:
            children.append(rank + bit)
        bit <<= 1
    return children, rank - bit if rank else None
