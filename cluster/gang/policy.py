"""Decides what a failure of the gang leads to: try again, resize, or give up. Plain values, no Ray."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.failures.errors import GangFailed

Cause = Literal["own error", "lost", "preempted", "no room"]

# The first restart is immediate: most losses are single. The next ones wait 1, 2, 4, ... s: what broke may need time.
FIRST_BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Restart:
    """One recovery. saved_step: of the newest checkpoint when the gang failed, -1 without one."""

    cause: Cause
    saved_step: int


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Form the gang again at its size: keep the processes that are left, replace those that are lost."""

    back_off_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Go on with fewer workers, or with as many or more on other nodes."""

    world_size: int
    back_off_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """End the run. own_error: the run itself raised the error, which then is all that the user needs to see."""

    reason: str
    own_error: bool = False


Decision = Retry | Resize | GiveUp


def cause_of(failed: GangFailed, preempted_ranks: Collection[int] = ()) -> Cause:
    """Classify a failure by what failed first.

    An error that a rank raised on its own account would be raised again: `own error`. A death, a rank that does not
    answer, a broken connection or a time-out may not: `lost`, or `preempted` on a node that was taken back. A
    replacement whose process did not start has no place: `no room`.
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
        saved_step: of the newest checkpoint, -1 without one.
        world_size: workers that the gang had, or was to have.
        capacity: workers that the living nodes could hold, the gang's own places included.
        sizes: numbers of workers that the run can have, the largest first.
        history: the recoveries so far.
        max_restarts: recoveries from `lost` that end the run unless a checkpoint newer than theirs was written since.
    """
    if cause == "own error":
        return GiveUp(reason="the run itself raised an error, which a restart would raise again", own_error=True)
    tries = sum(1 for past in history if past.cause == "lost" and past.saved_step >= saved_step)
    if cause == "lost" and tries >= max_restarts:
        since = f"a checkpoint after step {saved_step}" if saved_step >= 0 else "a first checkpoint"
        return GiveUp(reason=f"{tries} restarts without {since} (cluster.max_restarts {max_restarts})")
    # Where the number is fixed, a lost node may come back, or a spare: the start of the replacement waits for it.
    limit = world_size - 1 if cause == "no room" else capacity if len(sizes) > 1 else world_size
    fitting = [size for size in sizes if size <= limit]
    if not fitting:
        return GiveUp(reason=f"there is room for {min(limit, capacity)} workers, and the run needs {sizes[-1]}")
    wait_s = _back_off_s(tries) if cause == "lost" else 0.0
    size = world_size if world_size in fitting else fitting[0]
    # A node that is being taken back still holds its places: the replacement must go elsewhere.
    if size == world_size and cause != "preempted":
        return Retry(back_off_s=wait_s)
    return Resize(world_size=size, back_off_s=wait_s)


def _back_off_s(tries: int) -> float:
    return min(FIRST_BACK_OFF_S * 2.0 ** (tries - 1), MAX_BACK_OFF_S) if tries else 0.0
