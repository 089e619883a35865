"""Makes the faults of a plan (`fault_plan`) happen. For tests of failure, and for nothing else.

Training itself asks for no faults. Where a job has a plan, `install` wraps the functions in which faults happen: the
phases and collectives of the activity trackers (dispatch.diagnosis), the layers, the steps and their control.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dispatch.balance import bias_checksum
from dispatch.diagnosis.activity import Splits
from dispatch.diagnosis.activity_tracker import ActivityTracker
from dispatch.layer import MoELayer
from workers.control.loop import ControlLoop, StepControl
from workers.training.fault_plan import Fault
from workers.training.step import Trainer

HOLD_POLL_S = 0.05


class PlannedFault(RuntimeError):
    """The error that the action `raise` raises."""


class FaultPlan:
    """The faults of one rank.

    Each fires once in the life of a run: before it acts it leaves a file `faults/<number>.fired` in the run directory,
    so that a gang that forms again, which repeats the step, gets past it.
    """

    def __init__(self, faults: tuple[Fault, ...], rank: int, run_dir: Path) -> None:
        self._folder = run_dir / "faults"
        mine = {number: fault for number, fault in enumerate(faults) if fault.rank == rank}
        self._waiting = {number: fault for number, fault in mine.items() if not self._mark(number).exists()}

    def act(self, tracker: ActivityTracker) -> None:
        """Kill, stop, sleep, hold or raise if the plan says so for the tracker's step, phase and layer."""
        number, fault = self._fire(("kill", "stop", "sleep", "hold", "raise"), tracker.phase, tracker)
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

    def fires(self, action: Literal["skip", "lie"], phase: str, tracker: ActivityTracker) -> int:
        """Whether this rank is to skip a phase or lie in it, at the tracker's step and layer: 0, or the amount."""
        _, fault = self._fire((action,), phase, tracker)
        return 0 if fault is None else int(fault.amount) or 1

    def _hold(self, go: Path, limit_s: float) -> None:
        give_up = time.monotonic() + limit_s
        while not go.exists() and time.monotonic() < give_up:
            time.sleep(HOLD_POLL_S)

    def _fire(self, actions: tuple[str, ...], phase: str, tracker: ActivityTracker) -> tuple[int, Fault | None]:
        for number, fault in tuple(self._waiting.items()):  # the threads of a rank share the plan
            if (
                fault.action in actions
                # A fault in a phase of a pipeline happens in whichever stage enters it first.
                and (fault.step, fault.phase) == (tracker.step, phase.partition(", stage")[0])
                and fault.layer in (None, tracker.layer)
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


def install(plan: FaultPlan, trainer: Trainer, control_tracker: ActivityTracker) -> None:
    """Make the plan's faults happen while `trainer` trains. control_tracker: the tracker of its control loop."""
    tracker = trainer.groups.tracker
    for each in (tracker, control_tracker):
        act_at_phases(plan, each)
    _wrap_method(tracker, "start", lambda start: _lie(plan, tracker, start))
    _wrap_method(tracker, "run", lambda run: _leave_out_gradients(plan, tracker, run))
    for layer in trainer.model.modules():
        if isinstance(layer, MoELayer):
            _leave_out_layer(plan, tracker, layer)
    _wrap_method(trainer, "step", lambda step: _leave_out_step(plan, tracker, step))
    _leave_out_bias_update(plan, control_tracker, trainer.control)


def act_at_phases(plan: FaultPlan, tracker: ActivityTracker) -> None:
    """Let the plan act at every entry of a phase."""

    def wrap(set_phase: Callable[[str], None]) -> Callable[[str], None]:
        def set_phase_and_act(phase: str) -> None:
            set_phase(phase)
            plan.act(tracker)

        return set_phase_and_act

    _wrap_method(tracker, "set_phase", wrap)


def _wrap_method(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of this one object by what `wrap` makes of it."""
    setattr(owner, name, wrap(getattr(owner, name)))


def _lie(plan: FaultPlan, tracker: ActivityTracker, start: Callable[..., Any]) -> Callable[..., Any]:
    def start_lying(op: Any, *args: Any, group: Any, splits: Splits | None = None) -> Any:
        amount = 0 if splits is None else plan.fires("lie", tracker.phase, tracker)
        if splits is not None and amount:
            other = 1 if splits.announced[0] == 0 else 0  # another rank: this one announces 0 rows to itself
            sent = [max(0, rows + amount * (rank == other)) for rank, rows in enumerate(splits.announced)]
            args, splits = (*args[:-1], sent), replace(splits, sent=sent)
        return start(op, *args, group=group, splits=splits)

    return start_lying


def _leave_out_gradients(plan: FaultPlan, tracker: ActivityTracker, run: Callable[..., None]) -> Callable[..., None]:
    # Steps to leave out: `fires` is true once, and reducing the gradients of a step makes several collectives.
    left_out: set[int] = set()

    def run_or_not(*args: Any, **kwargs: Any) -> None:
        if tracker.phase == "gradients" and plan.fires("skip", "gradients", tracker):
            left_out.add(tracker.step)
        if not (tracker.phase == "gradients" and tracker.step in left_out):
            run(*args, **kwargs)

    return run_or_not


def _leave_out_layer(plan: FaultPlan, tracker: ActivityTracker, layer: MoELayer) -> None:
    def wrap(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward_or_zeros(x: Tensor, *args: Any) -> Tensor:
            tracker.layer = layer.name
            return torch.zeros_like(x) if plan.fires("skip", "dispatch", tracker) else forward(x, *args)

        return forward_or_zeros

    _wrap_method(layer, "forward", wrap)


def _leave_out_step(plan: FaultPlan, tracker: ActivityTracker, step: Callable[..., Any]) -> Callable[..., Any]:
    def step_or_next(number: int, **kwargs: Any) -> Any:
        tracker.step = number
        return step(number + 1 if plan.fires("skip", "step", tracker) else number, **kwargs)

    return step_or_next


def _leave_out_bias_update(plan: FaultPlan, tracker: ActivityTracker, control: ControlLoop) -> None:
    """The rank goes on as if it were alone, with the bias that it has."""
    begin, finish, alone = control.begin_step, control.finish_step, list[StepControl]()

    def begin_or_not(step: int, counts_M: Tensor, **kwargs: Any) -> None:
        tracker.step = step
        if plan.fires("skip", "bias update", tracker):
            version, state = control.state()
            del kwargs["stop_requested"]
            alone.append(
                StepControl(
                    step=step,
                    counts_M=counts_M,
                    **kwargs,
                    stop=False,
                    bias_N=state.bias_N,
                    bias_version=version,
                    bias_checksum=bias_checksum(state.bias_N),
                    odd_ranks=(),
                    round_s={},
                    events=(),
                )
            )
        else:
            begin(step, counts_M, **kwargs)

    for name, method in (
        ("begin_step", begin_or_not),
        ("finish_step", lambda apply: alone.pop() if alone else finish(apply)),
    ):
        setattr(control, name, method)
