"""Minimum, maximum and mean of many curves over spans of steps, in bounded memory.

S curves; n points; B buckets. A bucket covers `width` steps. When the steps no longer fit into the buckets, each pair
of buckets becomes one and the width doubles. So a run of any length uses at least half of the buckets.
"""

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

# 1,000,000 steps are 31,250 buckets of 32 steps. A chart of 4,000 of these steps still has 125 points.
MAX_BUCKETS = 2**15
MIN_BUCKETS = 2**8  # allocated at first; more on demand

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]


class Spans(NamedTuple):
    """Curves over B spans of steps, in order. NaN where a span has no value of a curve."""

    first: Steps
    """(B,): the first step that a span covers, and `last` its last one."""
    last: Steps
    low: Floats
    """(B, S): the least value; `high` the greatest."""
    high: Floats
    mean: Floats

    def followed_by(self, later: "Spans") -> "Spans":
        """These spans, followed by those of later steps."""
        first, last = np.concatenate([self.first, later.first]), np.concatenate([self.last, later.last])
        low, high, mean = (np.concatenate(pair) for pair in zip(self[2:], later[2:], strict=True))
        return Spans(first, last, low, high, mean)

    @classmethod
    def empty(cls, num_curves: int) -> Self:
        """Curves without a span."""
        steps, values = np.zeros(0, np.int64), np.zeros((0, num_curves))
        return cls(steps, steps, values, values, values)


class _Sums(NamedTuple):
    """What a bucket keeps of the values of each curve; (B, S) each. Two buckets become one by merging these."""

    low: NDArray[Any]  # float32; NaN without a value
    high: NDArray[Any]  # float32; NaN without a value
    total: NDArray[Any]  # float64: the sum needs more digits than float32 has
    num: NDArray[Any]  # int32: number of values


class Buckets:
    """The buckets of `num_curves` curves. Points come in any order; a step may come twice."""

    def __init__(self, num_curves: int, *, max_buckets: int = MAX_BUCKETS) -> None:
        self.width = 1
        self._num_curves, self._max = num_curves, max_buckets
        self._sums = _empty(min(MIN_BUCKETS, max_buckets), num_curves)
        self._used = 0

    def add(self, steps: Steps, values: Floats) -> None:
        """Add n points. steps: (n,), at least 0. values: (n, S); NaN where a curve has none."""
        if not steps.size:
            return
        self._make_room(int(steps.max()))
        order = np.argsort(steps, kind="stable")
        where, sums = _summed(steps[order] // self.width, values[order])
        for mine, new, combine in zip(self._sums, sums, (np.fmin, np.fmax, np.add, np.add), strict=True):
            mine[where] = combine(mine[where], new)
        self._used = max(self._used, int(where[-1]) + 1)

    def spans(self, first: int, last: int, num: int, curves: list[int]) -> Spans:
        """At most `num` spans of the steps from `first` to `last`, of these curves; those without a value are left out.

        The spans are whole buckets: the outer two may reach over `first` and `last` by less than `width` steps.
        """
        begin, end = max(first, 0) // self.width, min(last // self.width + 1, self._used)
        if begin >= end:
            return Spans.empty(len(curves))
        buckets_per_span = -(-(end - begin) // num)
        starts = np.arange(0, end - begin, buckets_per_span)
        sums = _reduced(_Sums(*(each[begin:end, curves] for each in self._sums)), starts)
        firsts = (begin + starts) * self.width
        lasts = np.minimum(firsts + buckets_per_span * self.width, end * self.width) - 1
        return _as_spans(firsts, lasts, sums)

    def _make_room(self, step: int) -> None:
        while step // self.width >= self._max:
            self._halve()
        need = step // self.width + 1
        if need > len(self._sums.low):
            size = min(self._max, max(need, 2 * len(self._sums.low)))
            old, self._sums = self._sums, _empty(size, self._num_curves)
            for new, each in zip(self._sums, old, strict=True):
                new[: len(each)] = each

    def _halve(self) -> None:
        self._used = -(-self._used // 2)
        halves = _reduced(self._sums, np.arange(0, len(self._sums.low), 2))
        self._sums = _empty(len(self._sums.low), self._num_curves)
        for mine, half in zip(self._sums, halves, strict=True):
            mine[: len(half)] = half
        self.width *= 2


def spans_of(steps: Steps, values: Floats, first: int, last: int, num: int) -> Spans:
    """At most `num` spans of n points of increasing steps, from `first` to `last`. values: (n, S)."""
    inside = (steps >= first) & (steps <= last)
    steps, values = steps[inside], values[inside]
    if not steps.size:
        return Spans.empty(values.shape[1])
    width = -(-(int(steps[-1] - steps[0]) + 1) // num)
    where, sums = _summed((steps - steps[0]) // width, values)
    firsts = steps[0] + where * width
    return _as_spans(firsts, np.minimum(firsts + width - 1, steps[-1]), sums)


def _empty(num: int, num_curves: int) -> _Sums:
    shape = (num, num_curves)
    nothing = np.full(shape, np.nan, np.float32)
    return _Sums(nothing, nothing.copy(), np.zeros(shape), np.zeros(shape, np.int32))


def _summed(places: Steps, values: Floats) -> tuple[Steps, _Sums]:
    """Merge points of the same place. places: (n,), sorted. Returns each place once, and the sums of its points."""
    starts = np.flatnonzero(np.diff(places, prepend=places[0] - 1))
    known = np.isfinite(values)
    values = np.where(known, values, np.nan)
    points = _Sums(
        values.astype(np.float32), values.astype(np.float32), np.where(known, values, 0.0), known.astype(np.int32)
    )
    return places[starts], _reduced(points, starts)


def _reduced(sums: _Sums, starts: NDArray[np.int64]) -> _Sums:
    """Merge rows: row i of the result covers the rows from starts[i] to before starts[i + 1]."""
    return _Sums(
        np.fmin.reduceat(sums.low, starts, 0),
        np.fmax.reduceat(sums.high, starts, 0),
        np.add.reduceat(sums.total, starts, 0),
        np.add.reduceat(sums.num, starts, 0),
    )


def _as_spans(firsts: Steps, lasts: Steps, sums: _Sums) -> Spans:
    kept = sums.num.any(1)
    with np.errstate(invalid="ignore"):  # nothing over nothing is NaN
        mean = sums.total / sums.num
    low, high = sums.low.astype(np.float64), sums.high.astype(np.float64)
    return Spans(firsts[kept], lasts[kept], low[kept], high[kept], mean[kept])
