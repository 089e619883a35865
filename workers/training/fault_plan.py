"""The plan by which a job fails in tests of failure: which rank fails how, at which step and in which phase.

A job takes it from the JSON file that the environment variable TRIMTAB_FAULTS names, a list of objects with the fields
of `Fault`:

    [{"rank": 1, "step": 20, "phase": "experts", "action": "kill"}]
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dispatch.diagnosis.activity import MOE_PHASES
from dispatch.errors import InvalidValue

FAULTS_VARIABLE = "TRIMTAB_FAULTS"

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
    "samples",
    "checkpoint write",
)
_CAN_SKIP = ("step", "dispatch", "gradients", "bias update")
_CAN_LIE = ("dispatch", "combine", "backward dispatch", "backward combine")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong, once."""

    rank: int
    """The global rank."""
    step: int
    """The optimizer step, from 1; 0 is the evaluation before the first step."""
    phase: str
    """One of PHASES. The fault happens when the rank first enters it in this step, in `layer` if that is given."""
    action: Action
    """kill: SIGKILL to itself. stop: SIGSTOP to itself. sleep. hold: sleep until there is a file `faults/<number>.go`
    in the run directory. raise: PlannedFault. skip: leave the phase out; for dispatch the whole layer. The phase of a
    skip may also be "step". lie: pass other splits to the all-to-all than the other ranks were told."""
    layer: str | None = None
    """The MoE layer by name; empty for any."""
    amount: float = 0.0
    """sleep: seconds. hold: seconds at most. lie: rows more (or, negative, less) for one other rank."""

    def __post_init__(self) -> None:
        allowed = {"skip": _CAN_SKIP, "lie": _CAN_LIE}.get(self.action, PHASES)
        if self.action not in get_args(Action):
            raise InvalidValue(f"a fault's action ({self.action!r:.60}) must be one of {', '.join(get_args(Action))}")
        if self.phase not in allowed:
            raise InvalidValue(
                f"a fault's phase ({self.phase!r:.60}) must be, for the action {self.action}, one of "
                f"{', '.join(allowed)}"
            )
        if self.rank < 0 or self.step < 0:
            raise InvalidValue(f"a fault's rank ({self.rank}) and step ({self.step}) must be 0 or more")
        if (self.action in ("sleep", "hold") and self.amount <= 0) or (self.action == "lie" and not int(self.amount)):
            raise InvalidValue(
                f"a fault's amount ({self.amount:g}) must be seconds above 0 for sleep and hold, and a number of rows "
                "for lie"
            )


def planned_faults(environment: Mapping[str, str]) -> tuple[Fault, ...]:
    """The plan that `environment` names; empty without one.

    Raises:
        InvalidValue: the file is not there, or is not such a plan.
    """
    path = environment.get(FAULTS_VARIABLE)
    if not path:
        return ()
    try:
        return tuple(Fault(**fault) for fault in json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidValue(f"{FAULTS_VARIABLE} ({path}) is no plan of faults: {error}") from error
