"""Compares laws on one trace: the values that table, picture and JSON show.

Shapes: S steps of the trace.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dispatch.laws import BalanceConfig
from runtime.commands.replay.figures import LawFigures, figures_of, steady_steps
from runtime.commands.replay.floors import chance_floor, floor_by_step
from runtime.commands.replay.play import SimulatedLaw, max_vio_by_step
from runtime.commands.replay.trace import Trace

BALANCED_AT = 1.5  # times the practical floor
# Where the practical floor is unknown, it is taken as so many chance floors; on text it has been 1.5 to 4 of them.
CHANCE_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class LawOutcome:
    """One law: its figures, and the MaxVio of every step, mean over the layers."""

    config: BalanceConfig
    figures: LawFigures
    max_vio_S: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Laws by label.

    steps, steady: first and last step of the trace, and of its steady part. floor_S: the practical floor
    of each step, NaN on a trace too short for it. threshold_S: MaxVio_batch that counts as balanced.
    """

    name: str
    steps: tuple[int, int]
    steady: tuple[int, int]
    shift_step: int | None
    floor_S: NDArray[np.float64]
    threshold_S: NDArray[np.float64]
    chance_floor: float
    laws: Mapping[str, LawOutcome]

    def at_steady(self, values_S: NDArray[np.float64]) -> float:
        """Mean over the steady steps."""
        first, last = (step - self.steps[0] for step in self.steady)
        return float(values_S[first : last + 1].mean())

    @property
    def floors(self) -> dict[str, float]:
        """The floors that are known, by name; the practical floor is that of the steady steps."""
        named = {"practical floor": self.at_steady(self.floor_S), "chance floor": self.chance_floor}
        return {name: floor for name, floor in named.items() if math.isfinite(floor)}

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for a floor that is not known."""
        names = ("name", "steps", "steady", "shift_step", "chance_floor")
        return {
            **{name: getattr(self, name) for name in names},
            "practical_floor_by_step": None if np.isnan(self.floor_S).any() else self.floor_S.tolist(),
            "threshold_by_step": self.threshold_S.tolist(),
            "laws": {label: _law_json(law) for label, law in self.laws.items()},
        }


def compare(trace: Trace, simulated: Mapping[str, SimulatedLaw], threshold: float | None = None) -> Comparison:
    """Compare simulated laws. threshold: None for BALANCED_AT times the practical floor of each step."""
    steady = steady_steps(trace)
    floor_S, chance = floor_by_step(trace), chance_floor(trace)
    if threshold is not None:
        threshold_S = np.full(len(floor_S), threshold)
    else:
        threshold_S = BALANCED_AT * np.where(np.isnan(floor_S), CHANCE_FACTOR * chance, floor_S)
    laws = {
        label: LawOutcome(
            config=each.config,
            figures=figures_of(each, trace, threshold_S),
            max_vio_S=max_vio_by_step(each.counts, trace.layout.slices),
        )
        for label, each in simulated.items()
    }
    return Comparison(
        name=trace.name,
        steps=(trace.steps[0], trace.steps[-1]),
        steady=(steady[0], steady[-1]),
        shift_step=trace.shift_step,
        floor_S=floor_S,
        threshold_S=threshold_S,
        chance_floor=chance,
        laws=laws,
    )


def _law_json(law: LawOutcome) -> dict[str, Any]:
    return {"config": asdict(law.config), **asdict(law.figures), "max_vio_batch_by_step": law.max_vio_S.tolist()}
