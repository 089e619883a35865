"""What `trimtab bench coordinator` has measured: for its tables, its picture and its record."""

from dataclasses import dataclass

from runtime.commands.bench.coordinator.case import ControlCase
from runtime.commands.bench.coordinator.load import LoadFigures
from runtime.commands.bench.coordinator.model import HopCost, Modelled
from runtime.commands.bench.coordinator.ranks import RankFigures

FUNCTION, ACTOR = "function", "actor"  # where the coordinator runs: in the process of the leader, or in its own


@dataclass(frozen=True)
class ControlMeasurement:
    """Everything that was measured, and the model based on it.

    loads: by law. hop: cost of a message between two ranks; with one rank None, and `modelled` is empty.
    """

    case: ControlCase
    loads: dict[str, LoadFigures]
    ranks: RankFigures
    hop: HopCost | None
    modelled: list[Modelled]
