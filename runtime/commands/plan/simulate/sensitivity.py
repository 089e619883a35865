"""How much the time of a step changes when one assumption changes by a fifth."""

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
    """With an assumption at 0.8 and at 1.2 of its value: seconds of a balanced step, and a skewed step over those."""

    name: str
    step_s: tuple[float, float]
    times_balanced: tuple[float, float]

    @property
    def spread(self) -> float:
        """Seconds between the skewed steps of both; results are sorted by it."""
        low, high = (even * times for even, times in zip(self.step_s, self.times_balanced, strict=True))
        return abs(high - low)


def sensitivity(subject: Subject, hardware: Hardware, schedule: Schedule, max_vio: float) -> list[Sensitivity]:
    """The sensitivity of a step with this MaxVio in each layer; the assumption that matters most is first."""
    simulation = Simulation(subject, hardware, schedule)
    skew = factors_of(simulation, max_vio)
    found = []
    for name in assumptions(hardware):
        moved = [Simulation(subject, scaled(hardware, name, factor), schedule) for factor in FACTORS]
        found.append(_sensitivity(name, moved, [skew] * 2))
    skews = [factors_of(simulation, factor * max_vio) for factor in FACTORS]
    found.append(_sensitivity(MAX_VIO, [simulation] * 2, skews))
    return sorted(found, key=lambda each: -each.spread)


def _sensitivity(name: str, simulations: list[Simulation], skews: list[Factors]) -> Sensitivity:
    even = [simulation.step().step_s for simulation in simulations]
    skewed = [simulation.step(skew).step_s for simulation, skew in zip(simulations, skews, strict=True)]
    times = [one / base for one, base in zip(skewed, even, strict=True)]
    return Sensitivity(name, (even[0], even[1]), (times[0], times[1]))
