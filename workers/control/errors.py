"""The errors of the control path: raised on every rank, with the step and the phase that failed."""

from collections import Counter
from collections.abc import Sequence


class ControlError(RuntimeError):
    """The control path failed: its loop cannot be used again, and the gang must form anew. Survives pickling."""

    def __init__(self, step: int, phase: str, detail: str) -> None:
        super().__init__(step, phase, detail)
        self.step, self.phase, self.detail = step, phase, detail

    def __str__(self) -> str:
        return f"step {self.step}, control phase {self.phase}: {self.detail}"


class ControlTimeout(ControlError):
    """A rank or the coordinator did not answer in time."""


class BiasDiverged(ControlError):
    """Ranks disagree on step, law state or live bias: they would send the same token to different experts."""

    def __init__(self, step: int, phase: str, detail: str, ranks: tuple[int, ...]) -> None:
        super().__init__(step, phase, detail)
        self.args = (step, phase, detail, ranks)  # what pickle calls __init__ with
        self.ranks = ranks


class NoUpdate(ControlError):
    """Rank 0 could not compute the update: a bug in the law or its input. Rank 0's error has the traceback."""

    ranks = (0,)  # a report on the gang begins with the error of these ranks


def different_states(step: int, states: Sequence[tuple[int, ...]]) -> BiasDiverged:
    """The error of ranks whose law states differ. It names those without the state that most ranks have.

    states: step, version and checksum of each rank's state. Of states that equally many have, the lowest rank's counts.
    """
    common: tuple[int, ...] = Counter(states).most_common(1)[0][0]
    odd = tuple(rank for rank, state in enumerate(states) if state != common)
    shown = [
        f"rank {rank} step {states[rank][0]} version {states[rank][1]} state {states[rank][2]:08x}"
        for rank in (states.index(common), *odd[:8])
    ]
    return BiasDiverged(step, "verify", f"ranks hold different law states: {', '.join(shown)}", odd)
