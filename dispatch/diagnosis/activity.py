"""What a rank is doing, as plain values for other processes: neither torch nor Ray is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass

from dispatch.diagnosis.collective_errors import place_text

MOE_PHASES = ("dispatch", "experts", "combine")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Rows of one all-to-all for each rank of its group; 0 for this rank itself.

    announced: how many this rank told the others that it would send. sent: how many it handed to the backend. expected:
    how many the others told this rank.
    """

    announced: list[int]
    sent: list[int]
    expected: list[int]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective that a rank has started.

    group: the name of the process group, the same on all members. index: its number among the collectives of this group
    on this thread, from 1. members: global ranks. waited_s: seconds since its start, by the rank's own clock.
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
    """What one thread of a rank is doing. Survives pickling.

    step, layer, phase: where it is; phase_s: for how many seconds. waits_in: the oldest collective that it has started
    and that has not ended. started: the number of collectives that it has started, by group. recent: step, phase and
    layer, as text, of the last ones, by group and index. memory_bytes: of its process; 0 where it was not measured.
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
