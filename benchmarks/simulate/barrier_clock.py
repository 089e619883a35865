"""Measures how long a step would take on an idle machine, on a machine that other programs use too.

A process's CPU time runs only while it works, and not while others use its core. Ranks wait for each other only in
collectives. So the time between two waits is the CPU time of the slowest rank, or the work of all ranks divided by the
cores if that is longer; and the time of a step is the sum of these stretches.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from unittest.mock import patch

import torch.distributed as dist

from dispatch.diagnosis.activity_tracker import ActivityTracker, PendingCollective


@contextmanager
def stretches(tracker: ActivityTracker) -> Iterator[list[float]]:
    """CPU seconds of all threads of this process, from each wait of `tracker` to the next, the last up to the end."""
    marks = [time.process_time()]
    found: list[float] = []

    def note() -> None:
        marks.append(time.process_time())
        found.append(marks[-1] - marks[-2])

    wait = PendingCollective.wait

    def noted_wait(pending: PendingCollective, timeout: timedelta | None = None) -> None:
        wait(pending, timeout)
        if pending.tracker is tracker:
            note()

    with patch.object(PendingCollective, "wait", noted_wait):
        yield found
        note()


def critical_path(ranks: Sequence[Sequence[float]], cores: int) -> float:
    """Seconds of a step, from the stretches of every rank.

    Raises:
        ValueError: the ranks did not wait equally often.
    """
    return sum(max(*stretch, sum(stretch) / cores) for stretch in zip(*ranks, strict=True))


def over_ranks(mine: list[float], group: dist.ProcessGroup) -> list[list[float]]:
    """The stretches of all ranks. Collective."""
    found: list[list[float]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(found, mine, group=group)
    return found
