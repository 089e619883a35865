"""What a rank is in, as it tells those who watch it: plain values, which neither torch nor Ray is needed to read."""

from __future__ import annotations

from dataclasses import dataclass

from dispatch.diagnosis.collective_errors import place_text

MOE_PHASES = ("dispatch", "experts", "combine")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Rows of one exchange by rank of its group, 0 for this rank itself.

    announced: what this rank told the others that it would send. sent: what it handed to the backend. expected: what
    the others told it.
    """

    announced: list[int]
    sent: list[int]
    expected: list[int]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective as a rank started it.

    group: its name, the same on all members. index: the how-many-th of that group on this thread, from 1. members:
    global ranks. waited_s: since it was started, by the rank's own clock.
    """

    op: str
    group: str
    index: int
    members: tuple[int, ...]
    step: int
    layer: str
    phase: str
    waited_s: float
    splits: Splits | None

    def __str__(self) -> str:
        return place_text(self.step, self.phase, self.layer)


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What one thread of a rank is in. Survives pickling.

    step, layer, phase: its place, and for how long. waits_in: the oldest collective that it started and that has not
    ended. started: by group, how many collectives it has started. recent: the places of the last ones, by group and
    index. memory_bytes: what its process holds; 0 where nobody asked.
    """

    step: int
    layer: str
    phase: str
    phase_s: float
    waits_in: Collective | None
    started: dict[str, int]
    recent: dict[tuple[str, int], str]
    memory_bytes: int = 0

    def __str__(self) -> str:
        return place_text(self.step, self.phase, self.layer)
