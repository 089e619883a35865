"""What `trimtab plan --simulate` found, and as JSON."""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from dispatch.errors import InvalidValue
from runtime.commands.plan.simulate.hardware import Hardware, hardware_of
from runtime.commands.plan.simulate.laws import LawCost, cost_of_laws
from runtime.commands.plan.simulate.scope import check_scope, left_out
from runtime.commands.plan.simulate.sensitivity import Sensitivity, sensitivity
from runtime.commands.plan.simulate.simulation import Schedule, Simulation
from runtime.commands.plan.simulate.sweep import MAX_VIOS, WORLDS, WorldCosts, by_max_vio, by_world
from runtime.commands.plan.subject import Subject
from runtime.runs.run_dir import find_run


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was simulated.

    planned: at the world size of the plan. sensitive_vio: the MaxVio of `sensitivities`. laws: empty without a trace.
    notes: what `left_out` says.
    """

    subject: Subject
    hardware: Hardware
    schedule: Schedule
    planned: WorldCosts
    worlds: tuple[WorldCosts, ...]
    sensitive_vio: float
    sensitivities: tuple[Sensitivity, ...]
    trace: str
    laws: tuple[LawCost, ...]
    notes: tuple[str, ...]


def simulate(subject: Subject, given: argparse.Namespace) -> Report:
    """Simulate the subject as the options of the command line ask.

    Raises:
        InvalidValue: an option is wrong, or a setting cannot be simulated.
    """
    check_scope(subject.config)
    hardware = hardware_of(given.hardware)
    schedule = Schedule(overlap=given.overlap, bubble=given.bubble)
    simulation = Simulation(subject, hardware, schedule)
    moe = subject.config.model.moe
    vios = given.max_vio or [value for value in MAX_VIOS if value <= moe.num_experts / moe.top_k - 1]
    middle = sorted(vios)[len(vios) // 2]
    if given.law and not given.trace:
        raise InvalidValue("--law needs --trace RUN, a run whose recorded scores it is replayed on")
    trace, laws = cost_of_laws(simulation, find_run(given.trace), given.law) if given.trace else ("", [])
    return Report(
        subject=subject,
        hardware=hardware,
        schedule=schedule,
        planned=by_max_vio(simulation, vios),
        worlds=tuple(by_world(subject, hardware, schedule, given.worlds or WORLDS, vios)),
        sensitive_vio=middle,
        sensitivities=tuple(sensitivity(subject, hardware, schedule, middle)),
        trace=trace,
        laws=tuple(laws),
        notes=left_out(subject.config),
    )


def as_json(report: Report) -> dict[str, Any]:
    """Plain values; "times_balanced" is a step's time over that of a balanced step."""
    return {
        "config": report.subject.name,
        "hardware": asdict(report.hardware),
        "schedule": asdict(report.schedule),
        "here": _world_json(report.planned),
        "worlds": [_world_json(each) for each in report.worlds],
        "sensitivity": {"max_vio": report.sensitive_vio, "moved": [asdict(each) for each in report.sensitivities]},
        "trace": report.trace,
        "notes": list(report.notes),
        "laws": [asdict(each) for each in report.laws],
    }


def _world_json(world: WorldCosts) -> dict[str, Any]:
    return {
        "world_size": world.world_size,
        "ep_size": world.ep_size,
        "balanced_step_s": world.balanced.step_s,
        "tokens_per_s_per_rank": world.balanced.tokens_per_s_per_rank,
        "parts_s": dict(world.balanced.parts),
        "costs": [asdict(each) for each in world.costs],
    }
