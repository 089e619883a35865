"""`trimtab chaos PRESET`: train on machines of namespaces, strike the run by a seeded plan, tell what became of it."""

import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console

from runtime.chaos.chart import write_chart
from runtime.chaos.options import ChaosOptions
from runtime.chaos.plan import ChaosFault, go_mark, make_plan, num_steps, worker_faults
from runtime.chaos.results import Results
from runtime.chaos.sameness import Line, differences
from runtime.chaos.stage import Stage, open_stage
from runtime.chaos.subject import SUPERSEDED, Subject, Unfulfilled
from runtime.chaos.trial import Trial, revive, strike
from runtime.quantities import duration

CALM_S = 1800.0  # For the undisturbed run; a tenth of it on a quiet machine.
SAY_EVERY_S = 30.0  # Between two lines about what is being waited for, where nobody looks at a terminal.


def chaos(options: ChaosOptions) -> int:
    """Run a preset to its end or its limit and write the results. Returns 1 if anything was not as promised."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: everything is torn down
    plan = make_plan(options.preset, options.seed)
    console = Console(highlight=False)
    with open_stage(options.preset) as stage, _Narrator(console) as narrator:
        show = _Show(stage, options, plan, narrator)
        try:
            show.play()
        finally:
            if show.trials:
                show.write()
            if options.keep:
                show.keep()
    for line in show.results().summary():
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"written: {options.out / 'chaos.md'}", soft_wrap=True, markup=False)
    return int(show.results().failed)


class _Narrator:
    """Says what goes on: one line a fault, and what is being waited for."""

    def __init__(self, console: Console) -> None:
        self._console, self._said = console, time.monotonic()
        self._status = console.status("booting machines") if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, soft_wrap=True, markup=False)

    def wait(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() > self._said + SAY_EVERY_S:
            self.tell(f"  {text}")


@dataclass
class _Show:
    """The two runs, calm and struck, and what came of them."""

    stage: Stage
    options: ChaosOptions
    plan: tuple[ChaosFault, ...]
    narrator: _Narrator
    trials: list[Trial] = field(default_factory=list)
    mismatches: dict[int, str] = field(default_factory=dict)
    calm: Sequence[Line] = field(default_factory=list)
    calm_evals: Sequence[Line] = field(default_factory=list)
    num_compared: int = 0
    end: str = "it was not reached"
    begun: float = field(default_factory=time.monotonic)
    now: str = ""

    def play(self) -> None:
        """The calm run, then the struck one."""
        preset, steps = self.options.preset, num_steps(self.plan)
        self.narrator.tell(
            f"{len(self.plan)} faults over {steps} steps on {preset.num_machines} machines with "
            f"{preset.workers_per_machine} workers each, seed {self.options.seed}, {preset.minutes:g} min at most"
        )
        self.stage.up()
        self.narrator.tell(f"cluster up after {duration(time.monotonic() - self.begun)}; first the calm run")
        self._play_calm(steps)
        run = self._subject("chaos")
        faults = self.stage.folder / "faults.json"
        faults.write_text(json.dumps(worker_faults(self.plan)))
        try:
            run.start(preset, self.options.seed, steps, faults)
            self._strike_all(run)
            self._finish(run)
        finally:
            run.stop()

    def _play_calm(self, steps: int) -> None:
        run = self._subject("calm")
        try:
            run.start(self.options.preset, self.options.seed, steps)
            run.wait(lambda: run.exit_code is not None, "calm run", CALM_S, may_end=True)
            self.calm, self.calm_evals = run.train_lines(), run.eval_lines()
        finally:
            run.stop()
        if run.exit_code != 0 or len(self.calm) != steps:
            raise RuntimeError(f"the undisturbed run failed already; it said:\n{run.said()[-3000:]}")
        self.narrator.tell(
            f"calm run done after {duration(time.monotonic() - self.begun)}: {self._calm_step_s:.2f} s a step"
        )

    def _strike_all(self, run: Subject) -> None:
        for fault in self.plan:
            self._release(run, fault)
            self.now = f"[{fault.number + 1}/{len(self.plan)}] {fault.kind.name}"
            trial = strike(run, fault, self.plan)
            self._compare(run, trial)
            self.trials.append(trial)
            self.narrator.tell(f"{self.now}, step {fault.step}: {_told(trial)}")
            if trial.verdict == "FAILED" and not revive(run):
                self.end = f"it could not be resumed after fault {fault.number + 1}: {trial.reason}"
                return
            if self._left_s < 0:
                return

    def _release(self, run: Subject, fault: ChaosFault) -> None:
        """Let the run come to a fault, for which it waits."""
        go = run.run_dir / go_mark(fault)
        run.wait(run.run_dir.exists, "its start", CALM_S)
        go.parent.mkdir(exist_ok=True)
        go.touch()

    def _finish(self, run: Subject) -> None:
        if len(self.trials) < len(self.plan) or self.end.startswith("it could not"):
            return
        self.now = "the last steps"
        try:
            run.wait(lambda: run.exit_code is not None, "its end", CALM_S, may_end=True)
        except Unfulfilled as error:
            self.end = str(error)
            return
        steps = [line["step"] for line in run.train_lines()]
        self._compare(run, None)
        if run.exit_code != 0:
            self.end = f"exit code {run.exit_code}"
        elif steps != list(range(1, num_steps(self.plan) + 1)):
            self.end = "its record does not hold every step once"
        else:
            self.end = ""

    def _compare(self, run: Subject, trial: Trial | None) -> None:
        """All that the run has recorded so far with the calm run, and what was made anew too."""
        lines, evals = [*run.train_lines(), *_superseded(run, "train")], [*run.eval_lines(), *_superseded(run, "eval")]
        found = differences(lines, self.calm) | differences(evals, self.calm_evals)
        new = {step: text for step, text in found.items() if step not in self.mismatches}
        self.num_compared = len(lines) + len(evals)
        self.mismatches |= new
        if new and trial is not None:
            step, text = min(new.items())
            trial.verdict, trial.reason = "FAILED", f"from step {step} on it trains something else: {text}"

    def results(self) -> Results:
        """What is known so far."""
        options = self.options
        return Results(
            preset=options.name,
            settings=options.preset,
            seed=options.seed,
            command=options.command,
            machine=f"{os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}, "
            f"load average {os.getloadavg()[0]:.0f}",
            calm_step_s=self._calm_step_s,
            minutes=(time.monotonic() - self.begun) / 60,
            trials=tuple(self.trials),
            missed=len(self.plan) - len(self.trials),
            mismatches=tuple(f"step {step}: {text}" for step, text in sorted(self.mismatches.items())),
            num_compared=self.num_compared,
            end=self.end,
        )

    def write(self) -> None:
        """The results, into the folder that was asked for."""
        run = self._subject("chaos")
        self.results().write(self.options.out)
        steps = [(line["time"], line["step"]) for line in [*run.train_lines(), *_superseded(run, "train")]]
        write_chart(steps, self.trials, self.options.out / "chaos.png")

    def keep(self) -> None:
        """Copies of both run directories and of what was printed."""
        target = self.options.out / "kept"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.stage.runs, target, dirs_exist_ok=True)
        for log in self.stage.folder.glob("*.log"):
            shutil.copy(log, target)

    @property
    def _left_s(self) -> float:
        return self.begun + 60 * self.options.preset.minutes - time.monotonic()

    @property
    def _calm_step_s(self) -> float:
        return statistics.median(line["step_s"] for line in self.calm) if self.calm else float("nan")

    def _subject(self, name: str) -> Subject:
        def on_wait(run: Subject, what: str) -> None:
            self.narrator.wait(
                f"{self.now} {what}: at step {run.step}; {duration(max(0.0, self._left_s))} left at most"
            )

        return Subject(self.stage, name, deadline=time.monotonic() + self._left_s, on_wait=on_wait)


def _told(trial: Trial) -> str:
    if trial.verdict == "FAILED":
        return f"FAILED: {trial.reason}"
    times = (("detected after", trial.detected_s), ("recovered after", trial.recovered_s))
    known = [f"{what} {seconds:.1f} s" for what, seconds in times if not math.isnan(seconds)]
    return ", ".join([trial.verdict, *known, f"{trial.redone} steps redone"])


def _superseded(run: Subject, kind: str) -> list[Line]:
    path: Path = run.run_dir / SUPERSEDED
    if not path.exists():
        return []
    lines: list[Line] = [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")]
    return [line for line in lines if line["kind"] == kind]
