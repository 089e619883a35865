"""Laws side by side on one trace: what table, picture and record are made of.

Shapes: S steps of the trace.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dispatch.laws import BalanceConfig
from runtime.replay.figures import BALANCED_AT, Figures, figures_of, steady_steps
from runtime.replay.play import Played, chance_floor, max_vio_by_step, practical_floor
from runtime.replay.trace import Trace

CHANCE_FACTOR = 2.0  # in place of the practical floor, which has been 1.5 to 4 times that of chance on text


@dataclass(frozen=True, kw_only=True)
class LawOutcome:
    """One law: its figures, and the MaxVio of every step, mean over the layers."""

    config: BalanceConfig
    figures: Figures
    max_vio_S: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Laws by label.

    steps, steady: first and last step of the trace and of its steady part, both inside. threshold: MaxVio_batch that
    counts as balanced. practical_floor: of the steady steps; NaN on a trace too short for it.
    """

    name: str
    steps: tuple[int, int]
    steady: tuple[int, int]
    shift_step: int | None
    threshold: float
    practical_floor: float
    chance_floor: float
    laws: Mapping[str, LawOutcome]

    @property
    def floors(self) -> dict[str, float]:
        """Those that are known, by name."""
        named = {"practical floor": self.practical_floor, "chance floor": self.chance_floor}
        return {name: floor for name, floor in named.items() if math.isfinite(floor)}

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for a floor that is not known."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "laws"}
        if math.isnan(self.practical_floor):
            values["practical_floor"] = None
        return {**values, "laws": {label: _law_json(law) for label, law in self.laws.items()}}


def compare(trace: Trace, played: Mapping[str, Played], threshold: float | None = None) -> Comparison:
    """Sum up what `play` gave. threshold: None for BALANCED_AT times the practical floor."""
    steady = steady_steps(trace)
    floors = practical_floor(trace, among=steady), chance_floor(trace)
    if threshold is None:
        threshold = BALANCED_AT * (CHANCE_FACTOR * floors[1] if math.isnan(floors[0]) else floors[0])
    laws = {
        label: LawOutcome(
            config=each.config,
            figures=figures_of(each, trace, threshold),
            max_vio_S=max_vio_by_step(each.counts, trace.layout.slices),
        )
        for label, each in played.items()
    }
    return Comparison(
        name=trace.name,
        steps=(trace.steps[0], trace.steps[-1]),
        steady=(steady[0], steady[-1]),
        shift_step=trace.shift_step,
        threshold=threshold,
        practical_floor=floors[0],
        chance_floor=floors[1],
        laws=laws,
    )


def _law_json(law: LawOutcome) -> dict[str, Any]:
    return {"config": asdict(law.config), **asdict(law.figures), "max_vio_batch_by_step": law.max_vio_S.tolist()}
