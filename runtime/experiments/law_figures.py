"""What is said of laws that were played on one trace: how near to balance, how soon, and at what price.

Shapes: S steps of the trace.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dispatch.laws import BalanceConfig
from dispatch.layout import LoadLayout
from runtime.experiments.play import Played, chance_floor, max_vio_by_step, practical_floor
from runtime.experiments.trace import Trace

STEADY_STEPS = 50
SMOOTH_STEPS = 5  # one lucky batch is not balance
FLOORS_TO_BALANCE = 1.5


@dataclass(frozen=True, kw_only=True)
class LawFigures:
    """One law. MaxVio is the mean over layers.

    max_vio_batch, max_vio_global: of the steady steps, each alone and their loads summed. num_steps_to_balance: until
    the mean of SMOOTH_STEPS is below the threshold, num_steps_to_recover: the same from the shift on; None: never.
    regret: part of the score that the choice gave away against top-k without bias, steady steps.
    """

    config: BalanceConfig
    max_vio_S: NDArray[np.float64]
    max_vio_batch: float
    max_vio_global: float
    num_steps_to_balance: int | None
    num_steps_to_recover: int | None
    regret: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; MaxVio of each step as a list."""
        named = ("max_vio_batch", "max_vio_global", "num_steps_to_balance", "num_steps_to_recover", "regret")
        figures = {name: getattr(self, name) for name in named}
        return {"config": asdict(self.config), **figures, "max_vio_batch_by_step": self.max_vio_S.tolist()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Laws side by side on one trace.

    steps: first and last, both inside. steady: the steps that the steady figures are of. practical_floor: NaN on a
    trace too short for it.
    """

    name: str
    steps: tuple[int, int]
    steady: tuple[int, int]
    shift_step: int | None
    threshold: float
    practical_floor: float
    chance_floor: float
    laws: Mapping[str, LawFigures]

    def to_json(self) -> dict[str, Any]:
        """Plain values, null for a floor that is not known."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "laws"}
        values["practical_floor"] = None if np.isnan(self.practical_floor) else self.practical_floor
        return {**values, "laws": {label: law.to_json() for label, law in self.laws.items()}}


def compare(trace: Trace, played: Mapping[str, Played], threshold: float | None = None) -> Comparison:
    """Sum up what `play` gave. threshold: of MaxVio_batch, for balance; None: FLOORS_TO_BALANCE times the floor."""
    floors = practical_floor(trace), chance_floor(trace)
    if threshold is None:
        threshold = FLOORS_TO_BALANCE * (floors[1] if np.isnan(floors[0]) else floors[0])
    steps = trace.steps
    num_before = len(steps) if trace.shift_step is None else trace.shift_step - steps[0]
    # A quarter at most: of a short trace the rest is the way to balance.
    steady = slice(num_before - max(1, min(STEADY_STEPS, num_before // 4)), num_before)
    return Comparison(
        name=trace.name,
        steps=(steps[0], steps[-1]),
        steady=(steps[steady.start], steps[steady.stop - 1]),
        shift_step=trace.shift_step,
        threshold=threshold,
        practical_floor=floors[0],
        chance_floor=floors[1],
        laws={label: _figures(trace, each, steady, threshold) for label, each in played.items()},
    )


def _figures(trace: Trace, played: Played, steady: slice, threshold: float) -> LawFigures:
    max_vio_S = max_vio_by_step(played.counts, trace.layout.slices)
    shift = None if trace.shift_step is None else trace.shift_step - trace.steps[0]
    return LawFigures(
        config=played.config,
        max_vio_S=max_vio_S,
        max_vio_batch=float(max_vio_S[steady].mean()),
        max_vio_global=_max_vio_global(played.counts[steady], trace.layout),
        num_steps_to_balance=_steps_until_below(max_vio_S[:shift], threshold),
        num_steps_to_recover=None if shift is None else _steps_until_below(max_vio_S[shift:], threshold),
        regret=float(played.regret[steady].mean()),
    )


def _max_vio_global(counts: NDArray[np.int64], layout: LoadLayout) -> float:
    return float(max_vio_by_step(counts.sum(0, keepdims=True), layout.slices)[0])


def _steps_until_below(max_vio_S: NDArray[np.float64], threshold: float) -> int | None:
    """The last of the first SMOOTH_STEPS in a row whose mean is below it, counted from 1."""
    if len(max_vio_S) < SMOOTH_STEPS:
        return None
    means = np.convolve(max_vio_S, np.full(SMOOTH_STEPS, 1 / SMOOTH_STEPS), "valid")
    below = np.flatnonzero(means < threshold)
    return int(below[0]) + SMOOTH_STEPS if below.size else None
