"""Laws replayed on the router scores of a real run, and what the imbalance that each leaves would cost.

The loads are those of the run's global batches. Where the planned model has as many experts as the run, its layers get
the loads of the run's layers, repeated where the run has fewer. Where the number of experts differs, only the MaxVio of
each step and layer is taken, and `routing.log_normal_load` spreads it over the experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.commands.plan.simulate.routing import Factors, factors_of_load, skewed
from runtime.commands.plan.simulate.simulation import Simulation
from runtime.commands.replay.figures import steady_steps
from runtime.commands.replay.play import max_vio_of_rows
from runtime.commands.replay.replay import one_thread, simulate_with_progress
from runtime.commands.replay.score_trace import RecordedTrace
from runtime.commands.replay.specs import parse_law
from runtime.commands.replay.trace import Trace

DEFAULT_LAWS = ("none", "sign:u=0.001", "adaptive")


@dataclass(frozen=True)
class LawCost:
    """What one law costs on a trace.

    max_vio: of the steady steps, mean over layers. *_times: time of a step over that of a balanced one: mean of all
    steps, mean of the steady ones, and the largest. step_s: mean of the steady steps. peak_bytes: memory of the rank
    with most rows in the step that needs most.
    """

    law: str
    max_vio: float
    mean_times: float
    steady_times: float
    worst_times: float
    step_s: float
    peak_bytes: float


def cost_of_laws(simulation: Simulation, run: Path, specs: Sequence[str]) -> tuple[str, list[LawCost]]:
    """The name of the trace, and the cost of each law on it.

    Raises:
        InvalidValue: a law is written wrongly, or the run recorded no scores.
    """
    chosen = {spec: parse_law(spec) for spec in specs or DEFAULT_LAWS}
    trace = RecordedTrace(run)
    with one_thread():
        simulated = simulate_with_progress(trace, chosen)
    return trace.name, [law_cost(simulation, name, each.counts, trace) for name, each in simulated.items()]


def law_cost(simulation: Simulation, law: str, counts: NDArray[np.int64], trace: Trace) -> LawCost:
    """The cost of a law. counts: (steps, experts of all layers), the loads under the law."""
    loads = [np.stack([row[where] for where in trace.layout.slices]).astype(np.float64) for row in counts]
    even = simulation.step().step_s
    steps = [simulation.step(factors_on(simulation, load)) for load in loads]
    times = np.array([step.step_s / even for step in steps])
    steady = [step - trace.steps[0] for step in steady_steps(trace)]
    return LawCost(
        law=law,
        max_vio=float(np.mean([max_vio_of_rows(loads[each]) for each in steady])),
        mean_times=float(times.mean()),
        steady_times=float(times[steady].mean()),
        worst_times=float(times.max()),
        step_s=float(times[steady].mean() * even),
        peak_bytes=max(step.peak_bytes for step in steps),
    )


def factors_on(simulation: Simulation, load_LE: NDArray[np.float64]) -> Factors:
    """The factors (`routing`) that the loads of a trace's layers give in the simulation."""
    model = simulation.config.model
    layers = [each % len(load_LE) for each in range(model.num_moe_layers)]
    if load_LE.shape[1] == model.moe.num_experts:
        return factors_of_load(load_LE[layers], simulation.experts_of_ranks)
    max_vio_limit = model.moe.num_experts / model.moe.top_k - 1
    values = [min(max_vio_limit, float(value)) for value in max_vio_of_rows(load_LE)[layers]]
    return skewed(values, model.moe.num_experts, model.moe.top_k, simulation.experts_of_ranks)
