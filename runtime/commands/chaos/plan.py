"""Which faults strike a run, where and when: a pure function of a preset and a seed. Imports neither torch nor Ray."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatch.errors import InvalidValue
from runtime.commands.chaos.kinds import KINDS, FaultKind

CHECKPOINT_EVERY = 4  # Few, since every recovery repeats the steps since the last checkpoint.
EVAL_EVERY = 5  # So that evaluations fall before, upon and after checkpoints.
# Steps between two faults: two checkpoints, so that a recovery has made its own and a damaged one has another before
# it, and some steps for the start of the next fault to vary.
UNIT = 3 * CHECKPOINT_EVERY
# Before each fault the run waits at most so long until the checks of the fault before are done. Below the timeout of a
# collective.
HOLD_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The size of a chaos run."""

    num_faults: int
    """Faults; every kind is drawn once before any is drawn again."""
    num_machines: int
    """Machines, one Ray node each; the first one is the head and runs the driver."""
    workers_per_machine: int
    """Expert workers of each machine."""
    minutes: float
    """Longest duration of all of it; faults that are not reached by then count as failed."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Names of the kinds to draw from."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.kinds if name not in KINDS]:
            raise InvalidValue(f"{unknown[0]!r} is no kind of fault; there are {', '.join(KINDS)}")
        if self.num_machines < 2:
            raise InvalidValue(f"num_machines ({self.num_machines}) must be at least 2: links and nodes are to fail")
        if self.num_faults < 1 or self.workers_per_machine < 1 or self.minutes <= 0:
            raise InvalidValue(
                f"num_faults ({self.num_faults}) and workers_per_machine ({self.workers_per_machine}) must be at "
                f"least 1, minutes ({self.minutes:g}) above 0"
            )

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.num_machines * self.workers_per_machine


PRESETS = {
    "quick": Preset(
        num_faults=6,
        num_machines=2,
        workers_per_machine=1,
        minutes=15,
        kinds=("kill in dispatch", "kill driver", "cut link briefly", "kill coordinator", "kill node", "fill disk"),
    ),
    "full": Preset(num_faults=len(KINDS), num_machines=3, workers_per_machine=2, minutes=60),
}


@dataclass(frozen=True, kw_only=True)
class ChaosFault:
    """One fault of a plan. rank: the rank that is struck. machine: that of the rank; what a fault of a node strikes."""

    number: int
    kind: FaultKind
    step: int
    rank: int
    machine: int


@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    """The options of `trimtab chaos`. name: of the preset. command: the command line. keep: copy the runs to `out`."""

    name: str
    preset: Preset
    seed: int
    out: Path
    keep: bool
    command: str


def make_plan(preset: Preset, seed: int) -> tuple[ChaosFault, ...]:
    """Draw the faults, in the order of their steps. Ranks are numbered machine by machine, as in the gang."""
    draw = random.Random(seed)
    kinds = _kinds(preset, draw)
    plan, begin = [], UNIT
    for number in range(preset.num_faults):
        kind = next(kinds)
        step = begin + draw.randrange(CHECKPOINT_EVERY)
        if kind.phase == "checkpoint write":
            step += -step % CHECKPOINT_EVERY
        machine = draw.randrange(1 if kind.strikes_node else 0, preset.num_machines)
        rank = machine * preset.workers_per_machine + draw.randrange(preset.workers_per_machine)
        plan.append(ChaosFault(number=number, kind=kind, step=step, rank=rank, machine=machine))
        begin += UNIT * kind.room
    return tuple(plan)


def num_steps(plan: tuple[ChaosFault, ...]) -> int:
    """Length of the run: room for the last recovery, too."""
    return (plan[-1].step // UNIT + plan[-1].kind.room + 1) * UNIT


def worker_faults(plan: tuple[ChaosFault, ...]) -> list[dict[str, Any]]:
    """The plan of `workers.training.faults`: first an action "hold" before each fault, then the planned faults.

    A hold makes rank 0 wait, for HOLD_S at most, until the file `go_mark(fault)` exists.
    """
    holds = [
        {"rank": 0, "step": _hold_step(fault), "phase": "forward", "action": "hold", "amount": HOLD_S} for fault in plan
    ]
    return holds + [
        {
            "rank": fault.rank,
            "step": fault.step,
            "phase": fault.kind.phase,
            "action": fault.kind.action,
            "amount": fault.kind.amount,
        }
        for fault in plan
        if fault.kind.is_planned
    ]


def fired_mark(plan: tuple[ChaosFault, ...], fault: ChaosFault) -> str:
    """The file in the run directory that the worker writes when a planned fault strikes."""
    planned = [each.number for each in plan if each.kind.is_planned]
    return f"faults/{len(plan) + planned.index(fault.number)}.fired"


def go_mark(fault: ChaosFault) -> str:
    """The file in the run directory that ends the hold before a fault (`worker_faults`)."""
    return f"faults/{fault.number}.go"


def _hold_step(fault: ChaosFault) -> int:
    return fault.step - fault.step % UNIT - 1


def _kinds(preset: Preset, draw: random.Random) -> Iterator[FaultKind]:
    while True:
        for name in draw.sample(preset.kinds, len(preset.kinds)):
            yield KINDS[name]
