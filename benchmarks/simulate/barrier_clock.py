"""How long ranks take that have their cores to themselves, on a machine that others use too.

Each rank's own CPU time runs only while it works, not while others have its core. Ranks wait for each other where they
wait for a collective. So the time of a stretch between two waits is that of its slowest rank, or of all its work on all
cores where that is longer, and the time of a step is the sum of its stretches.
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
    """CPU seconds of this process, all threads, from each wait of `tracker` to the next, and to the end."""
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
