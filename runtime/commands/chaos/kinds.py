"""The kinds of fault, and what a run promises under each. Plain data: imports neither torch nor Ray."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["recovers", "carries on", "refuses", "refuses to resume", "resumes", "saves"]


@dataclass(frozen=True, kw_only=True)
class FaultKind:
    """A kind of fault."""

    name: str
    """As in the table of results."""
    action: str
    """With a `phase`, the action of `workers.training.faults.Fault`; without, a function of `injections`."""
    phase: str = ""
    """Where in the step the worker's own fault plan makes it fail; empty: the fault is injected from outside."""
    amount: float = 0.0
    """The amount of `workers.training.faults.Fault`."""
    outcome: Outcome = "recovers"
    """recovers: the gang forms again by itself. carries on: the gang stays. refuses: the run ends with the promised
    error, and `--resume` continues it. refuses to resume: the driver is dead, and `--resume` ends with the promised
    error until the damage is mended. resumes: the driver is dead, and `--resume` continues. saves: as resumes, but the
    driver wrote a checkpoint first, so that no step is repeated."""
    promise: str = ""
    """Regular expression: of the reason in the event `failed` where the outcome is recovers, else of what the run
    prints. `{rank}` and `{node}` stand for those of the fault."""
    events: tuple[str, str] | None = None
    """carries on: the run's events that say that the fault was noticed, and that it is over."""
    room: int = 1
    """Distance to the next fault, times `plan.UNIT` steps: a fault that takes effect slowly needs more than 1."""
    is_bug: bool = False
    """refuses: whether the run ends as by a bug, with a traceback and the exit code of bugs."""
    takes_offer: bool = False
    """refuses to resume: whether the run then goes on from the step that the error offers."""
    strikes_node: bool = False
    """Whether it strikes a whole machine; never the head, which runs the driver."""

    @property
    def is_planned(self) -> bool:
        """Whether the worker's own fault plan makes it fail."""
        return bool(self.phase)


KILLED_IN = ("forward", "dispatch", "experts", "combine", "backward", "bias update", "optimizer", "checkpoint write")

_DIED = r"rank {rank} \(.*its process died"
_LOST = r"rank \d+ \({node}, .*(its process died|CollectiveTimeout: step \d+, )"


def _kill_in(phase: str) -> FaultKind:
    # The dead rank says nothing: its last answer, or the others, tell the step and the phase.
    place = r".* in step \d+, \w+( \w+)?( of [\w.]+)?"
    return FaultKind(name=f"kill in {phase}", action="kill", phase=phase, promise=_DIED + place)


def _error(name: str, action: str, phase: str, promise: str, amount: float = 0.0) -> FaultKind:
    return FaultKind(
        name=name, action=action, phase=phase, amount=amount, outcome="refuses", promise=promise, is_bug=True
    )


def _link(name: str, action: str) -> FaultKind:
    return FaultKind(name=name, action=action, outcome="carries on", strikes_node=True)


_ALL = (
    *map(_kill_in, KILLED_IN),
    FaultKind(
        name="stop in experts",
        action="stop",
        phase="experts",
        promise=r"rank {rank} .*CollectiveTimeout: step \d+, \w+.*missing: rank {rank}",
    ),
    _error("error in forward", "raise", "forward", r"PlannedFault: rank {rank} was to fail in step \d+, forward"),
    _error("wrong splits", "lie", "dispatch", r"WrongSplits: step \d+, dispatch of \S+: rank {rank} was about to", 2.0),
    _error("leave out a step", "skip", "step", r"RanksDiverged: step \d+, dispatch of \S+: rank {rank} left something"),
    FaultKind(
        name="leave out a dispatch",
        action="skip",
        phase="dispatch",
        promise=r"rank {rank} .*CollectiveTimeout: step \d+, dispatch of \S+: .*missing: rank {rank}",
    ),
    FaultKind(name="kill worker", action="kill_worker", promise=_DIED),
    FaultKind(name="kill driver", action="kill_driver", outcome="resumes"),
    FaultKind(name="kill driver with its own Ray", action="kill_own_ray_and_driver", outcome="resumes"),
    FaultKind(name="hang up", action="hang_up", outcome="saves", promise=r"stopped after step \d+, saved"),
    FaultKind(
        name="kill coordinator",
        action="kill_coordinator",
        outcome="carries on",
        promise="coordinator lost",
        events=("coordinator_lost", "coordinator_back"),
        room=3,
    ),
    FaultKind(name="kill node", action="kill_node", promise=_LOST, strikes_node=True),
    FaultKind(name="kill raylet", action="kill_raylet", promise=_LOST, strikes_node=True),
    FaultKind(name="kill agents", action="kill_agents", promise=_LOST, strikes_node=True),
    FaultKind(
        name="kill gcs",
        action="kill_gcs",
        outcome="refuses",
        promise=r"go on with: trimtab train --resume \S+ .*Ray.* (on this machine has died|has not answered for \d+ s)",
    ),
    FaultKind(name="cut link", action="cut_link", promise=_LOST, strikes_node=True),
    _link("cut link briefly", "cut_link_briefly"),
    _link("delay frames", "delay_frames"),
    _link("lose frames", "lose_frames"),
    _link("limit link", "limit_link"),
    FaultKind(
        name="fill disk",
        action="fill_disk",
        outcome="carries on",
        promise=r"checkpoint failed: step \d+; .*(are free|No space left)",
        events=("checkpoint_failed", "checkpoint"),
        room=2,
    ),
    FaultKind(name="damage checkpoint", action="damage_checkpoint", promise=_DIED, room=2),
    FaultKind(
        name="damage checkpoint before resume",
        action="damage_checkpoint_and_kill_driver",
        outcome="refuses to resume",
        takes_offer=True,
        promise=r"checkpoint \S+ is damaged: \S+ .*resume with --resume \S+ --step \d+",
        room=2,
    ),
    FaultKind(name="hole in the record", action="hole_in_record", outcome="refuses to resume"),
    FaultKind(
        name="remove run directory",
        action="remove_run_directory",
        outcome="refuses",
        promise=r"the run directory \S+ is no longer this run's",
        room=2,
    ),
    FaultKind(
        name="second writer",
        action="second_writer",
        outcome="carries on",
        room=2,
    ),
)
KINDS = {kind.name: kind for kind in _ALL}
