"""Loads of a replayed law on the ranks of a plan."""

from dataclasses import dataclass

import numpy as np
import pytest

from dispatch.layout import LoadLayout
from runtime.commands.plan.simulate.hardware import PRESETS
from runtime.commands.plan.simulate.laws import factors_on, law_cost
from runtime.commands.plan.simulate.routing import skewed
from runtime.commands.plan.simulate.simulation import Simulation
from tests.runtime.commands.plan.simulate.test_simulation import subject

LAYERS, EXPERTS = 2, 16


@dataclass
class Steps:
    """As much of a trace as is asked for."""

    layout: LoadLayout
    steps: range
    shift_step: int | None = None


def trace_of(num_steps: int) -> Steps:
    return Steps(LoadLayout(("a", "b"), (EXPERTS,) * LAYERS, (True,) * LAYERS), range(1, num_steps + 1))


def test_loads_are_those_of_the_trace_and_its_layers_come_again() -> None:
    simulation = Simulation(subject(), PRESETS["h100"])  # 3 MoE layers, 16 experts on 8 ranks
    load = np.random.default_rng(0).integers(1, 50, (LAYERS, EXPERTS)).astype(float)
    factors = factors_on(simulation, load)
    for layer in range(3):
        row = load[layer % LAYERS]
        for rank in range(8):
            assert factors[layer, rank] == pytest.approx(sum(row[2 * rank : 2 * rank + 2]) / (2 * row.mean()))


def test_of_another_number_of_experts_only_max_vio_is_taken() -> None:
    simulation = Simulation(subject(), PRESETS["h100"])
    load = np.ones((1, 8))
    load[0, 3] = 3.0  # MaxVio 1.4
    assert factors_on(simulation, load) == pytest.approx(skewed([1.4] * 3, 16, 2, [2] * 8))


def test_a_law_that_balances_costs_nothing_and_a_bad_step_costs_what_it_would_alone() -> None:
    simulation = Simulation(subject(), PRESETS["h100"])
    even = np.full((8, LAYERS * EXPERTS), 10)
    cost = law_cost(simulation, "even", even, trace_of(8))
    assert (cost.mean_times, cost.steady_times, cost.worst_times, cost.max_vio) == (1, 1, 1, 0)
    bad = even.copy()
    bad[2, :4] = 40
    cost = law_cost(simulation, "one bad step", bad, trace_of(8))
    load = bad[2].reshape(LAYERS, EXPERTS).astype(float)
    alone = simulation.step(factors_on(simulation, load)).step_s / simulation.step().step_s
    assert cost.worst_times == alone > 1
    assert cost.mean_times == pytest.approx((7 + alone) / 8)
    assert cost.steady_times == 1
