"""Faults by plan: which rank fails how, at which step and in which phase. For tests of failure, and for nothing else.

A plan hooks into the board of a rank (dispatch.board), which every phase and every collective passes. A job takes
one from the JSON file that the environment variable TRIMTAB_FAULTS names, a list of objects with the fields of `Fault`:

    [{"rank": 1, "step": 20, "phase": "experts", "action": "kill"}]
"""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dispatch.activity import MOE_PHASES
from dispatch.board import Board
from dispatch.errors import InvalidValue

FAULTS_VARIABLE = "TRIMTAB_FAULTS"
HOLD_POLL_S = 0.05

Action = Literal["kill", "stop", "sleep", "hold", "raise", "skip", "lie"]

PHASES = (
    "forward",
    *MOE_PHASES,
    "backward",
    *(f"backward {phase}" for phase in MOE_PHASES),
    "gradients",
    "gradient norm",
    "optimizer",
    "bias update",
    "evaluation",
    "checkpoint write",
)
_CAN_SKIP = ("step", "dispatch", "gradients", "bias update")
_CAN_LIE = ("dispatch", "combine", "backward dispatch", "backward combine")


class PlannedFault(RuntimeError):
    """The error that the action `raise` raises."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong, once."""

    rank: int
    """The global rank."""
    step: int
    """The optimizer step, from 1."""
    phase: str
    """Where: one of PHASES. At its first entry in the step, or the first in `layer`."""
    action: Action
    """kill: SIGKILL to itself. stop: SIGSTOP to itself. sleep. hold: sleep until there is a file `faults/<number>.go`
    in the run directory. raise: PlannedFault. skip: leave the phase out, of a dispatch the whole layer; here the phase
    may also be "step". lie: hand other splits to an exchange than were announced."""
    layer: str | None = None
    """The MoE layer by name; empty for any."""
    amount: float = 0.0
    """sleep: seconds. hold: seconds at most. lie: rows more (or, negative, less) for one other rank."""

    def __post_init__(self) -> None:
        allowed = {"skip": _CAN_SKIP, "lie": _CAN_LIE}.get(self.action, PHASES)
        if self.action not in get_args(Action):
            raise InvalidValue(f"a fault's action ({self.action!r}) must be one of {', '.join(get_args(Action))}")
        if self.phase not in allowed:
            raise InvalidValue(
                f"a fault's phase ({self.phase!r}) must be, for the action {self.action}, one of {', '.join(allowed)}"
            )
        if self.rank < 0 or self.step < 0:
            raise InvalidValue(f"a fault's rank ({self.rank}) and step ({self.step}) must be 0 or more")
        if (self.action in ("sleep", "hold") and self.amount <= 0) or (self.action == "lie" and not int(self.amount)):
            raise InvalidValue(
                f"a fault's amount ({self.amount:g}) must be seconds above 0 for sleep and hold, and a number of rows "
                "for lie"
            )


class FaultPlan:
    """The faults of one rank as a `dispatch.board.Trigger`.

    Each fires once in the life of a run: before it acts it leaves a file `faults/<number>.fired` in the run directory,
    so that a gang that forms again, which repeats the step, gets past it.
    """

    def __init__(self, faults: tuple[Fault, ...], rank: int, run_dir: Path) -> None:
        self._folder = run_dir / "faults"
        mine = {number: fault for number, fault in enumerate(faults) if fault.rank == rank}
        self._waiting = {number: fault for number, fault in mine.items() if not self._mark(number).exists()}

    def act(self, board: Board) -> None:
        """Kill, stop, sleep, hold or raise where the plan says so."""
        number, fault = self._fire(("kill", "stop", "sleep", "hold", "raise"), board.phase, board)
        if fault is None:
            return
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.action == "sleep":
            time.sleep(fault.amount)
        elif fault.action == "hold":
            self._hold(self._folder / f"{number}.go", fault.amount)
        else:
            raise PlannedFault(f"rank {fault.rank} was to fail in step {fault.step}, {fault.phase}")

    def wants(self, action: Literal["skip", "lie"], phase: str, board: Board) -> int:
        """See `dispatch.board.Trigger`."""
        _, fault = self._fire((action,), phase, board)
        return 0 if fault is None else int(fault.amount) or 1

    def _hold(self, go: Path, limit_s: float) -> None:
        give_up = time.monotonic() + limit_s
        while not go.exists() and time.monotonic() < give_up:
            time.sleep(HOLD_POLL_S)

    def _fire(self, actions: tuple[str, ...], phase: str, board: Board) -> tuple[int, Fault | None]:
        for number, fault in tuple(self._waiting.items()):  # the threads of a rank share the plan
            if (
                fault.action in actions
                and (fault.step, fault.phase) == (board.step, phase)
                and fault.layer in (None, board.layer)
            ):
                del self._waiting[number]
                self._remember(number)
                return number, fault
        return -1, None

    def _remember(self, number: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._mark(number).open("x") as file:
            os.fsync(file.fileno())
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)  # or the name of the file could be lost with the machine
        os.close(folder)

    def _mark(self, number: int) -> Path:
        return self._folder / f"{number}.fired"


def planned_faults(environment: Mapping[str, str]) -> tuple[Fault, ...]:
    """The plan that `environment` names; empty without one.

    Raises:
        ValueError: the file is not there, or is not such a plan.
    """
    path = environment.get(FAULTS_VARIABLE)
    if not path:
        return ()
    try:
        return tuple(Fault(**fault) for fault in json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidValue(f"{FAULTS_VARIABLE} ({path}) is no plan of faults: {error}") from error
