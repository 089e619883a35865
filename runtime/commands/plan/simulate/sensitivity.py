"""How the answer moves when one assumption moves by a fifth."""

from dataclasses import dataclass

from runtime.commands.plan.simulate.hardware import Hardware, assumptions, scaled
from runtime.commands.plan.simulate.routing import Factors
from runtime.commands.plan.simulate.simulation import Schedule, Simulation
from runtime.commands.plan.simulate.sweep import factors_of
from runtime.commands.plan.subject import Subject

FACTORS = (0.8, 1.2)
MAX_VIO = "MaxVio itself"


@dataclass(frozen=True)
class Sensitivity:
    """At 0.8 and at 1.2 times an assumption: the balanced step's seconds, and a skewed one's over them."""

    name: str
    step_s: tuple[float, float]
    times_balanced: tuple[float, float]

    @property
    def spread(self) -> float:
        """How far the skewed step moves, to sort by."""
        low, high = (even * times for even, times in zip(self.step_s, self.times_balanced, strict=True))
        return abs(high - low)


def sensitivity(subject: Subject, hardware: Hardware, schedule: Schedule, max_vio: float) -> list[Sensitivity]:
    """Of a step with this MaxVio in each layer, the assumption that moves the step most first."""
    simulation = Simulation(subject, hardware, schedule)
    skew = factors_of(simulation, max_vio)
    moved = [
        _moved(name, [Simulation(subject, scaled(hardware, name, factor), schedule) for factor in FACTORS], [skew] * 2)
        for name in assumptions(hardware)
    ]
    skews = [factors_of(simulation, factor * max_vio) for factor in FACTORS]
    moved.append(_moved(MAX_VIO, [simulation] * 2, skews))
    return sorted(moved, key=lambda each: -each.spread)


def _moved(name: str, simulations: list[Simulation], skews: list[Factors]) -> Sensitivity:
    even = [simulation.step().step_s for simulation in simulations]
    skewed = [simulation.step(skew).step_s for simulation, skew in zip(simulations, skews, strict=True)]
    times = [one / base for one, base in zip(skewed, even, strict=True)]
    return Sensitivity(name, (even[0], even[1]), (times[0], times[1]))
