"""Decides what a failure of the gang leads to: try again, resize, or give up. Plain values, no Ray."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.failures.errors import GangFailed

Cause = Literal["own error", "lost", "preempted", "no room"]

# The first restart is immediate, since most losses are single. Later ones wait 1, 2, 4, ... s: the cause, such as a
# node that reboots, may need time to go away.
FIRST_BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Restart:
    """One past recovery. saved_step: step of the newest checkpoint when the gang failed, -1 without one."""

    cause: Cause
    saved_step: int


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Form the gang again at its size: keep the processes that are left, replace those that are lost."""

    back_off_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Go on with another number of workers, or with as many on other nodes."""

    world_size: int
    back_off_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """End the run. own_error: the run itself raised the error, so the user sees that error and no list of restarts."""

    reason: str
    own_error: bool = False


Decision = Retry | Resize | GiveUp


def cause_of(failed: GangFailed, preempted_ranks: Collection[int] = ()) -> Cause:
    """Classify a failure by what failed first.

    `own error`: a rank raised an error of its own, which a restart would raise again. `lost`: a rank died, hung or did
    not answer, or a connection broke; a restart may succeed. `preempted`: the same, on a node that the cloud takes
    back. `no room`: the process of a replacement did not start, since Ray found no place for it.
    """
    first = failed.first
    if failed.method == "start" and first.kind == "silent":
        return "no room"
    if first.rank in preempted_ranks:
        return "preempted"
    return "own error" if first.is_own_error else "lost"


def decide(
    cause: Cause,
    *,
    saved_step: int,
    world_size: int,
    capacity: int,
    sizes: Sequence[int],
    history: Sequence[Restart],
    max_restarts: int,
) -> Decision:
    """Decide how the run goes on after a failure.

    Args:
        saved_step: step of the newest checkpoint, -1 without one.
        world_size: workers that the gang had, or was to have.
        capacity: workers that the living nodes could hold if nothing but this gang ran there.
        sizes: numbers of workers that the run can have, the largest first.
        history: the recoveries so far.
        max_restarts: recoveries from `lost` that may follow each other without a newer checkpoint between them.
    """
    if cause == "own error":
        return GiveUp(reason="the run itself raised an error, which a restart would raise again", own_error=True)
    tries = sum(1 for past in history if past.cause == "lost" and past.saved_step >= saved_step)
    if cause == "lost" and tries >= max_restarts:
        since = f"a checkpoint after step {saved_step}" if saved_step >= 0 else "a first checkpoint"
        return GiveUp(reason=f"{tries} restarts without {since} (cluster.max_restarts {max_restarts})")
    if cause == "no room":
        limit = world_size - 1
    elif len(sizes) > 1:
        limit = capacity
    else:  # The run has but one size. The replacement's start waits for the lost node to come back, or for a spare.
        limit = world_size
    fitting = [size for size in sizes if size <= limit]
    if not fitting:
        return GiveUp(reason=f"there is room for {min(limit, capacity)} workers, and the run needs {sizes[-1]}")
    wait_s = _back_off_s(tries) if cause == "lost" else 0.0
    size = world_size if world_size in fitting else fitting[0]
    # A retry puts the replacement into the lost bundle, which may lie on the node that the cloud takes back.
    if size == world_size and cause != "preempted":
        return Retry(back_off_s=wait_s)
    return Resize(world_size=size, back_off_s=wait_s)


def _back_off_s(tries: int) -> float:
    return min(FIRST_BACK_OFF_S * 2.0 ** (tries - 1), MAX_BACK_OFF_S) if tries else 0.0
