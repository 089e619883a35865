"""How many sequences of each source a batch holds, as a function of the step alone, with exact shares over a run.

All shares are whole thousandths, so that no rounding can differ between machines or add up over a long run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dispatch.errors import InvalidValue

# Shares are multiples of 1 / PARTS, and the counts of the steps repeat after PARTS steps. The offset of step s is
# s * STRIDE modulo PARTS:
# it takes each value once in a period, as the two numbers have no common factor. Of all strides 633 keeps the sums
# within a period closest to the exact shares: off by 2 sequences at most for one share of 0.01 to 0.99 (619, near the
# golden section, is off by 12).
PARTS = 1000
STRIDE = 633

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MixSchedule:
    """Weights of the sources over a run. Without weights, batches draw from the windows of all sources together.

    before, after: one weight for each source, in any unit. shift_at: the first step, counted from 1, that is drawn by
    `after`; 0 for never.
    """

    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    shift_at: int = 0

    def __post_init__(self) -> None:
        for name, weights in (("data.mix", self.before), ("data.mix_after", self.after)):
            if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
                raise InvalidValue(f"{name} {list(weights)} must hold numbers of at least 0, one a source")
            if weights and not sum(weights):
                raise InvalidValue(f"{name} {list(weights)} gives every source the weight 0; raise one of them")
        if bool(self.after) != bool(self.shift_at):
            raise InvalidValue(
                f"data.mix_after {list(self.after)} and data.shift_at ({self.shift_at}) belong together: "
                "give both or neither"
            )
        if self.shift_at < 0 or self.shift_at == 1:
            raise InvalidValue(
                f"data.shift_at ({self.shift_at}) must be 0 or a step above 1, the first that data.mix_after draws"
            )
        if self.after and not self.before:
            raise InvalidValue(f"data.mix_after {list(self.after)} needs data.mix, the weights before the shift")

    def weights_at(self, step: int) -> tuple[float, ...]:
        """The weights of a step, counted from 1; empty without a mix."""
        return self.after if self.shift_at and step >= self.shift_at else self.before

    def check_sources(self, names: Sequence[str]) -> None:
        """Raise InvalidValue unless there is one weight for each source, or no weights."""
        for setting, weights in (("data.mix", self.before), ("data.mix_after", self.after)):
            if weights and len(weights) != len(names):
                raise InvalidValue(
                    f"{setting} has {len(weights)} weights, but there are {len(names)} sources ({', '.join(names)}); "
                    f"give one weight a source, or none for all windows in proportion (--{setting} [])"
                )


class MixCounts:
    """Sequences of each source in the batches of a run whose mix is `schedule`. Steps count from 0."""

    def __init__(self, schedule: MixSchedule, global_batch_size: int) -> None:
        self._before = _Shares(schedule.before, global_batch_size)
        self._after = _Shares(schedule.after or schedule.before, global_batch_size)
        self._shift = schedule.shift_at - 1 if schedule.shift_at else None

    def counts_at(self, step: int) -> IndexArray:
        """Sequences of each source in a step: (num_sources,), whose sum is the batch size.

        A share that is a whole number of sequences is exact in every step.
        """
        is_before = self._shift is None or step < self._shift
        return self._before.counts_at(step) if is_before else self._after.counts_at(step)

    def counts_before(self, step: int) -> IndexArray:
        """Sequences of each source in all steps before `step`: (num_sources,)."""
        before, after, shift = self._before.counts_before, self._after.counts_before, self._shift
        return before(step) if shift is None or step <= shift else before(shift) + after(step) - after(shift)


class _Shares:
    """Systematic sampling by fixed shares.

    The interval [0, 1) is divided among the sources by their shares. Sequence j of B in a batch is of the source in
    whose interval the point (j + offset / PARTS) / B lies; the offset differs from step to step.
    """

    def __init__(self, weights: tuple[float, ...], global_batch_size: int) -> None:
        # (num_sources + 1,): where each source's interval begins, in units of 1 / (PARTS * B), in which the points are
        # the whole numbers PARTS * j + offset.
        self._edges = np.concatenate([[0], np.cumsum(_round_shares(weights))]) * global_batch_size

    def counts_at(self, step: int) -> IndexArray:
        return self._count([step])

    def counts_before(self, step: int) -> IndexArray:
        # Over a whole period the offsets are 0 to PARTS - 1. The sum of ceil((x - offset) / PARTS), the points below an
        # edge x, over these offsets is x itself.
        num_periods, rest = divmod(step, PARTS)
        counts: IndexArray = num_periods * np.diff(self._edges)
        return counts + self._count(range(rest))

    def _count(self, steps: Sequence[int]) -> IndexArray:
        offsets = np.array(steps, dtype=np.int64).reshape(-1, 1) * STRIDE % PARTS
        below = -((offsets - self._edges) // PARTS)  # points below each edge
        counts: IndexArray = np.diff(below, axis=1).sum(0)
        return counts


def _round_shares(weights: tuple[float, ...]) -> IndexArray:
    """Shares as whole numbers of 1 / PARTS: rounded down, and what then lacks goes to the largest remainders."""
    exact = np.array(weights, dtype=np.float64) * (PARTS / math.fsum(weights))
    parts = np.floor(exact).astype(np.int64)
    for source in np.argsort(parts - exact, kind="stable")[: PARTS - int(parts.sum())]:
        parts[source] += 1
    return parts
