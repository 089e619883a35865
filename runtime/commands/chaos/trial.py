"""Injects one fault into a run and reads from the run's own records how it came through."""

import math
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.commands.chaos.damage import DAMAGES, Damage
from runtime.commands.chaos.injections import INJECTIONS, MENDS
from runtime.commands.chaos.plan import CHECKPOINT_EVERY, UNIT, ChaosFault, fired_mark, go_mark
from runtime.commands.chaos.target import TargetRun, Unfulfilled
from runtime.commands.chaos.testbed import TestbedFailed
from runtime.terminal.failure import BUG_CODE
from runtime.terminal.interrupt import exit_code_of

REACH_S = 600.0  # For the run to come to the step of a fault.
RECOVER_S = 300.0  # From a fault to the next new step.
SAY_S = 10.0  # For the terminal to show what the records hold.
STEPS_AFTER = 2  # Steps that a run which carried on makes before that is believed.

Verdict = Literal["survived", "refused", "FAILED"]


@dataclass(kw_only=True)
class Trial:
    """What became of a fault.

    struck: Unix time of the fault, NaN before it. detected_s: seconds from there until the run reported it;
    recovered_s: until its next new step was done; NaN where there was nothing to detect. redone: number of steps that
    were repeated. parts: seconds of recovered_s by what they were for. said: the run's own words. reason: why it is
    FAILED.
    """

    fault: ChaosFault
    verdict: Verdict = "FAILED"
    struck: float = math.nan
    detected_s: float = math.nan
    recovered_s: float = math.nan
    redone: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    said: str = ""
    reason: str = ""

    def fail(self, reason: str) -> None:
        """Mark the trial as failed; the first reason is kept."""
        self.verdict, self.reason = "FAILED", self.reason or reason

    def told(self) -> str:
        """Sum the trial up in a line."""
        if self.verdict == "FAILED":
            return f"FAILED: {self.reason}"
        times = (("detected after", self.detected_s), ("recovered after", self.recovered_s))
        known = [f"{what} {seconds:.1f} s" for what, seconds in times if not math.isnan(seconds)]
        return ", ".join([self.verdict, *known, f"{self.redone} steps redone"])


def strike(run: TargetRun, fault: ChaosFault, plan: tuple[ChaosFault, ...]) -> Trial:
    """Inject a fault, and check that its outcome is the promised one. The run may be dead afterwards: see `revive`."""
    trial = Trial(fault=fault)
    before, superseded = len(run.said()), len(run.superseded_lines())
    try:
        trial.struck = _fire(run, fault, plan)
        OUTCOMES[fault.kind.outcome](run, trial, before)
    except (Unfulfilled, TestbedFailed) as error:
        trial.fail(str(error))
    trial.redone = len(run.superseded_lines()) - superseded
    return trial


def _fire(run: TargetRun, fault: ChaosFault, plan: tuple[ChaosFault, ...]) -> float:
    """Inject the fault, or wait for the worker that is to fail by plan. Returns the Unix time at which it struck."""
    where = f"step {fault.step}"
    run.wait(run.run_dir.exists, "its start", REACH_S)
    _release(run, fault)
    if not fault.kind.is_planned:
        run.wait(lambda: run.step >= fault.step, where, REACH_S)
        return INJECTIONS[fault.kind.action](run, fault)
    mark = run.run_dir / fired_mark(plan, fault)
    run.wait(lambda: mark.exists() or run.step > fault.step + UNIT // 2, where, REACH_S, may_end=True)
    if not mark.exists():
        raise Unfulfilled(f"{where} is over, and rank {fault.rank} was never in {fault.kind.phase}")
    return mark.stat().st_mtime


def _release(run: TargetRun, fault: ChaosFault) -> None:
    """End the hold before a fault (`plan.worker_faults`)."""
    go = run.run_dir / go_mark(fault)
    go.parent.mkdir(exist_ok=True)
    go.touch()


def _recovers(run: TargetRun, trial: Trial, _: int) -> None:
    """Expect the gang to form again, and read how long each part of that took."""
    since = trial.struck
    event = run.wait(lambda: next(iter(run.events("recovered", since)), None), "recovering", RECOVER_S)
    failed = run.events("failed", since)[0]
    trial.detected_s = failed["time"] - since
    trial.recovered_s = event["time"] - since
    # The gang's own clock starts when the driver hears of the failure.
    trial.parts = {"noticing": trial.recovered_s - event["total_s"], **event["seconds"]}
    trial.verdict = "survived"
    _keep_promise(run, trial, lambda: failed["reason"])


def _carries_on(run: TargetRun, trial: Trial, before: int) -> None:
    """Expect that the gang stays, and that steps follow."""
    first = run.step
    run.wait(lambda: run.step >= first + STEPS_AFTER, "going on", RECOVER_S)
    if failed := run.events("failed", trial.struck):
        # It came through, but by a recovery that this fault should not have needed.
        _recovers(run, trial, before)
        raise Unfulfilled(f"the gang was to stay: {failed[0]['reason']}")
    trial.verdict = "survived"
    if trial.fault.kind.events is not None:
        _note_events(run, trial, *trial.fault.kind.events)
        _keep_promise(run, trial, lambda: run.said(before))


def _note_events(run: TargetRun, trial: Trial, noticed: str, over: str) -> None:
    """Time when the run noticed the fault, and when it was over, unless the next fault is too near to wait for that."""
    last_step = trial.fault.step + UNIT * trial.fault.kind.room - CHECKPOINT_EVERY
    event = run.wait(lambda: next(iter(run.events(noticed, trial.struck)), None), noticed, RECOVER_S)
    trial.detected_s = event["time"] - trial.struck
    run.wait(lambda: run.events(over, event["time"]) or run.step >= last_step, over, RECOVER_S)
    if ends := run.events(over, event["time"]):
        trial.recovered_s = ends[0]["time"] - trial.struck


def _refuses(run: TargetRun, trial: Trial, before: int) -> None:
    """Expect the run to end and say why; then resume it as a user would."""
    mend = MENDS.get(trial.fault.kind.action, lambda _: None)  # most faults leave nothing to mend
    try:
        _await_error(run, trial)
    except Unfulfilled:
        mend(run)  # though the trial has failed: without it no later fault could be tried
        raise
    mend(run)
    if run.exit_code != (expected := BUG_CODE if trial.fault.kind.is_bug else 1):
        raise Unfulfilled(f"the run ended with exit code {run.exit_code} instead of {expected}")
    _keep_promise(run, trial, lambda: run.said(before))
    trial.verdict = "refused"
    _resume(run, trial, None)


def _await_error(run: TargetRun, trial: Trial) -> None:
    since = trial.struck
    run.wait(lambda: run.exit_code is not None or run.events("recovered", since), "ending", RECOVER_S, may_end=True)
    if run.exit_code is None:
        trial.said = run.events("failed", since)[0]["reason"]
        raise Unfulfilled("the run recovered instead of ending with the promised error")
    trial.detected_s = time.time() - trial.struck


def _refuses_to_resume(run: TargetRun, trial: Trial, before: int) -> None:
    """Expect that resuming is refused, with a message that says what is wrong and what to do; then do that."""
    _await_end(run, trial)
    for damage in DAMAGES[trial.fault.kind.action]:
        _refuse(run, trial, damage)
    trial.verdict = "refused"
    offered = re.search(r"--step (\d+)", run.said(before)) if trial.fault.kind.takes_offer else None
    _resume(run, trial, int(offered[1]) if offered else None)


def _refuse(run: TargetRun, trial: Trial, damage: Damage) -> None:
    before, since = len(run.said()), time.time()
    with damage(run, trial.fault) as promise:
        run.resume()
        run.wait(
            lambda: run.exit_code is not None or run.events("resumed", since), "refusing to resume", RECOVER_S,
            may_end=True,
        )  # fmt: skip
        if run.exit_code not in (1, 2):
            run.stop()
            raise Unfulfilled(f"{getattr(damage, '__name__', '')}: resuming was not refused")
        _keep_promise(run, trial, lambda: run.said(before), promise)


def _resumes(run: TargetRun, trial: Trial, _: int) -> None:
    """Expect driver and workers to be gone; resume the run by its name."""
    _await_end(run, trial)
    trial.verdict = "survived"
    _resume(run, trial, None)


def _saves(run: TargetRun, trial: Trial, before: int) -> None:
    """Expect the run to save and stop in order; when it is resumed, it must not repeat a step."""
    _await_end(run, trial)
    if run.exit_code != exit_code_of(signal.SIGHUP) or not run.events("interrupted", trial.struck):
        raise Unfulfilled(f"the run did not save and stop; it ended with exit code {run.exit_code}")
    _keep_promise(run, trial, lambda: run.said(before))
    superseded = len(run.superseded_lines())
    trial.verdict = "survived"
    _resume(run, trial, None)
    if again := len(run.superseded_lines()) - superseded:
        raise Unfulfilled(f"{again} steps were lost, although the run was to save before it stopped")


def _await_end(run: TargetRun, trial: Trial) -> None:
    run.wait_for_end("the end of the driver", RECOVER_S)
    trial.detected_s = time.time() - trial.struck


OUTCOMES: dict[str, Callable[[TargetRun, Trial, int], None]] = {
    "recovers": _recovers,
    "carries on": _carries_on,
    "refuses": _refuses,
    "refuses to resume": _refuses_to_resume,
    "resumes": _resumes,
    "saves": _saves,
}


def revive(run: TargetRun) -> bool:
    """Start the run again if a trial has left it dead. Returns whether it lives."""
    if run.exit_code is None:
        return True
    since = time.time()
    run.resume()
    try:
        run.wait(lambda: _first_step(run, since), "resuming", RECOVER_S)
    except Unfulfilled:
        return False
    return True


def _resume(run: TargetRun, trial: Trial, step: int | None) -> None:
    since = time.time()
    run.resume(step)
    line = run.wait(lambda: _first_step(run, since), "the first step after resuming", RECOVER_S)
    resumed = run.events("resumed", since)[0]
    trial.recovered_s = line["time"] - trial.struck
    ray_s, gang_s = resumed["ray_s"], resumed["gang_s"]
    trial.parts = {
        "until resumed": since - trial.struck,
        "driver, load": resumed["time"] - since - ray_s - gang_s,
        "Ray": ray_s,
        "workers": gang_s,
        "first step": line["time"] - resumed["time"],
    }


def _first_step(run: TargetRun, since: float) -> dict[str, Any] | None:
    if not run.events("resumed", since):
        return None
    return next((line for line in run.lines() if line["time"] >= since), None)


def _keep_promise(run: TargetRun, trial: Trial, text: Callable[[], str], promise: str | None = None) -> None:
    """Wait until the text matches the promise, by default that of the fault's kind, and note the match in the trial."""
    fault = trial.fault
    node = re.escape(run.testbed.machines[fault.machine].address)
    pattern = (promise or fault.kind.promise).replace("{rank}", str(fault.rank)).replace("{node}", node)

    def find() -> re.Match[str] | None:
        return re.search(pattern, " ".join(text().split()))

    found = run.wait(find, f"saying what it promises ({pattern})", SAY_S, may_end=True)
    trial.said = (trial.said or found[0]).replace(f"{run.testbed.folder}/", "")
