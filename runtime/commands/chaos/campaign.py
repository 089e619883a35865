"""Runs `trimtab chaos`: trains an undisturbed run, then injects faults into a second one and compares the two."""

import json
import math
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

import yaml

from runtime.commands.chaos.chart import write_chart
from runtime.commands.chaos.leftovers import left_by_cluster
from runtime.commands.chaos.plan import ChaosOptions, make_plan, num_steps, worker_faults
from runtime.commands.chaos.record import Record, read_record
from runtime.commands.chaos.results import Results
from runtime.commands.chaos.sameness import flaws
from runtime.commands.chaos.target import TargetRun, Unfulfilled
from runtime.commands.chaos.testbed import Testbed, open_testbed
from runtime.commands.chaos.trial import Trial, revive, strike
from runtime.commands.chaos.weights import Digests, checkpoint_digests, weight_flaws
from runtime.terminal.progress_line import ProgressLine
from runtime.terminal.quantities import duration

CALM_S = 1800.0  # For the undisturbed run, and for the last steps of the other; minutes on a loaded machine.


def run_campaign(options: ChaosOptions) -> int:
    """Run a preset to its end or its limit and write the results. Returns 1 if anything was not as promised."""
    with open_testbed(options.preset) as testbed, ProgressLine(sys.stdout) as progress:
        campaign = Campaign(testbed, options, progress)
        try:
            campaign.run()
        finally:  # what was reached is written too
            if campaign.trials:
                campaign.write()
            if options.keep:
                campaign.keep()
        results = campaign.results()
    sys.stdout.write("\n".join([*results.summary(), f"written: {options.out / 'chaos.md'}"]) + "\n")
    return int(results.failed)


class Campaign:
    """Injects a plan of faults into a run; `trials` has one entry for each fault so far."""

    def __init__(self, testbed: Testbed, options: ChaosOptions, progress: ProgressLine) -> None:
        self._testbed, self._options, self._progress = testbed, options, progress
        self._plan = make_plan(options.preset, options.seed)
        self.trials: list[Trial] = []
        self._calm: Record | None = None
        self._calm_weights: dict[int, Digests] = {}
        self._calm_step_s = math.nan
        self._num_assignments = 0
        self._mismatches: dict[str, str] = {}
        self._num_compared: dict[str, int] = {}
        self._leftovers: list[str] = []
        self._end = "it was not reached"
        self._begun, self._doing = time.monotonic(), ""

    def run(self) -> None:
        """Train the undisturbed run, then the one that is struck.

        Raises:
            TestbedFailed, RuntimeError: the cluster did not come up, or the undisturbed run failed already.
        """
        preset, steps = self._options.preset, num_steps(self._plan)
        self._progress.tell(
            f"{len(self._plan)} faults over {steps} steps on {preset.num_machines} machines with "
            f"{preset.workers_per_machine} workers each, seed {self._options.seed}, {preset.minutes:g} min at most"
        )
        self._progress.show_minor("starting the cluster")
        self._testbed.up()
        self._progress.tell(f"cluster up after {self._elapsed}; first the calm run")
        self._train_calm(steps)
        faults = self._testbed.folder / "faults.json"
        faults.write_text(json.dumps(worker_faults(self._plan)))
        run = self._target("chaos")
        try:
            run.start(preset, self._options.seed, steps, faults)
            if self._strike_all(run):
                self._finish(run)
        finally:
            run.stop()
        self._testbed.down()
        self._leftovers += left_by_cluster(self._testbed)

    def results(self) -> Results:
        """Return what is known so far."""
        options = self._options
        return Results(
            preset=options.name,
            settings=options.preset,
            seed=options.seed,
            command=options.command,
            machine=f"{os.cpu_count()} cores, {platform.system()}, load average {os.getloadavg()[2]:.0f}",
            calm_step_s=self._calm_step_s,
            minutes=(time.monotonic() - self._begun) / 60,
            trials=tuple(self.trials),
            missed=len(self._plan) - len(self.trials),
            mismatches=tuple(f"{place}: {text}" for place, text in self._mismatches.items()),
            num_compared=self._num_compared,
            leftovers=tuple(self._leftovers),
            end=self._end,
        )

    def write(self) -> None:
        """Write the results into the user's folder."""
        self.results().write(self._options.out)
        run = self._target("chaos")
        lines = run.superseded_lines() + run.lines()
        write_chart([(line["time"], line["step"]) for line in lines], self.trials, self._options.out / "chaos.png")

    def keep(self) -> None:
        """Copy both run directories and the logs."""
        target = self._options.out / "kept"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self._testbed.runs, target)
        for log in self._testbed.folder.glob("*.log"):
            shutil.copy(log, target)

    def _train_calm(self, steps: int) -> None:
        run = self._target("calm")
        try:
            run.start(self._options.preset, self._options.seed, steps)
            run.wait_for_end("calm run", CALM_S)
        finally:
            run.stop()
        lines = run.lines()
        if run.exit_code != 0 or len(lines) != steps:
            raise RuntimeError(f"the undisturbed run failed already; it said:\n{run.said()[-3000:]}")
        self._calm, self._calm_weights = read_record(run.run_dir), checkpoint_digests(run.run_dir)
        self._num_assignments = assignments_of(run.run_dir)
        self._calm_step_s = statistics.median(line["step_s"] for line in lines)
        self._progress.tell(f"calm run done after {self._elapsed}: {self._calm_step_s:.2f} s a step")

    def _strike_all(self, run: TargetRun) -> bool:
        """Inject all faults of the plan, one after the other. Returns whether the run is alive afterwards."""
        for fault in self._plan:
            self._doing = f"[{fault.number + 1}/{len(self._plan)}] {fault.kind.name}"
            trial = strike(run, fault, self._plan)
            self.trials.append(trial)
            self._compare(run, trial)
            self._note_leftovers(trial, run.leftovers.still_there())
            self._progress.tell(f"{self._doing}, step {fault.step}: {trial.told()}")
            if trial.verdict == "FAILED" and not revive(run):
                self._end = f"it could not be resumed after fault {fault.number + 1}"
                return False
            if self._left_s < 0:
                self._end = f"its {self._options.preset.minutes:g} minutes were over"
                return False
        return True

    def _finish(self, run: TargetRun) -> None:
        self._doing = "the last steps"
        try:
            run.wait_for_end("its end", CALM_S)
        except Unfulfilled as error:
            self._end = str(error)
            return
        self._end = f"exit code {run.exit_code}" if run.exit_code else ""
        self._compare(run, None)
        weights = checkpoint_digests(run.run_dir)
        self._mismatches |= weight_flaws(weights, self._calm_weights, num_steps(self._plan))
        self._num_compared["tensors"] = sum(len(weights[step]) for step in weights.keys() & self._calm_weights.keys())
        self._leftovers += run.leftovers.after_the_end()

    def _compare(self, run: TargetRun, trial: Trial | None) -> None:
        """Compare all that the run has recorded, repeated steps too, with the calm run. trial: None at the end."""
        if self._calm is None:
            raise AssertionError("the calm run comes first")
        record = read_record(run.run_dir)
        found = flaws(record, self._calm, self._num_assignments, ended=trial is None)
        new = {place: text for place, text in found.items() if place not in self._mismatches}
        self._num_compared = {
            "steps and evaluations": len(record.lines) + len(record.superseded_lines),
            "records of load and statistics": record.num_stored,
        }
        self._mismatches |= new
        if new and trial is not None:
            place, text = next(iter(new.items()))
            trial.fail(f"{place}: {text}")

    def _note_leftovers(self, trial: Trial, left: list[str]) -> None:
        if left:
            self._leftovers += left
            trial.fail(f"left behind: {'; '.join(left)}")

    @property
    def _left_s(self) -> float:
        return self._begun + 60 * self._options.preset.minutes - time.monotonic()

    @property
    def _elapsed(self) -> str:
        return duration(time.monotonic() - self._begun)

    def _target(self, name: str) -> TargetRun:
        def on_wait(run: TargetRun, what: str) -> None:
            left = duration(max(0.0, self._left_s))
            self._progress.show_minor(f"{self._doing} {what}: at step {run.step}; {left} left at most".strip())

        return TargetRun(self._testbed, name, deadline=time.monotonic() + self._left_s, on_wait=on_wait)


def assignments_of(run_dir: Path) -> int:
    """(token, expert) pairs that the routers of all MoE layers choose in a step: so many rows are dispatched."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    model = config["model"]
    num_tokens = config["run"]["global_batch_size"] * model["max_seq_len"]
    return int(num_tokens * model["moe"]["top_k"] * (model["num_layers"] - model["num_dense_layers"]))
