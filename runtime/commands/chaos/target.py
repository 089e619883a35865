"""The run that faults strike: started and resumed as a user does it, and watched through what it writes."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dispatch.errors import UserError
from runtime.commands.chaos.leftovers import Leftovers
from runtime.commands.chaos.machines import MachineProcess
from runtime.commands.chaos.plan import CHECKPOINT_EVERY, EVAL_EVERY, Preset
from runtime.commands.chaos.record import superseded_lines
from runtime.commands.chaos.testbed import Testbed
from runtime.commands.compare.run_pool import last_step
from workers.record.run_log import EVENTS, METRICS, read_events, read_metrics
from workers.training.fault_plan import FAULTS_VARIABLE

POLL_S = 0.2
STOP_S = 10.0
# A rank that is stopped or cut off is reported after so long. Generous: all machines share the cores of this host.
COLLECTIVE_TIMEOUT_S = 20.0


class Unfulfilled(UserError):
    """The run did not do what it should. The message says what."""


class TargetRun:
    """A training run on a testbed.

    deadline: of the whole campaign, on the monotonic clock. on_wait: called about every POLL_S by `wait`, with the run
    and what it waits for.
    """

    def __init__(
        self, testbed: Testbed, name: str, *, deadline: float, on_wait: Callable[["TargetRun", str], None]
    ) -> None:
        self.testbed, self.name, self.run_dir = testbed, name, testbed.runs / name
        self.terminal = testbed.folder / f"{name}.log"
        self.terminal.touch()
        self.leftovers = Leftovers(testbed, self.run_dir)
        self._deadline, self._on_wait = deadline, on_wait
        self._process: subprocess.Popen[bytes] | None = None
        self._faults = ""

    def start(self, preset: Preset, seed: int, num_steps: int, faults: Path | None = None) -> None:
        """Begin the run. faults: the plan for its workers."""
        self._faults = "" if faults is None else str(faults)
        settings = {**_settings(self.testbed, preset.world_size), "run.seed": seed}
        self._begin("train", *_as_options(settings), f"--name={self.name}", f"--steps={num_steps}")

    def resume(self, step: int | None = None) -> None:
        """Resume the run by its name, from the newest checkpoint or that of `step`."""
        self.leftovers.note()
        self._begin("train", "--resume", self.name, *([] if step is None else ["--step", str(step)]))

    def sibling(self, name: str) -> "TargetRun":
        """Another run on the same testbed, with the same deadline and `on_wait`."""
        return TargetRun(self.testbed, name, deadline=self._deadline, on_wait=self._on_wait)

    def start_with_own_ray(self) -> None:
        """Begin the run with one worker on a Ray that the driver starts and ends; nobody waits for its end."""
        options = {**_settings(self.testbed, world_size=1), "workers": 1}
        del options["cluster.address"]
        self._begin("train", *_as_options(options), f"--name={self.name}", "--steps=5000")

    def second_start(self, machine: int) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a run of the same name on a machine while this one lives; its process, and the file of its output."""
        log = self.testbed.folder / "second start.log"
        settings = {**_settings(self.testbed, world_size=1), "optim.lr": 0.01}
        return self.testbed.start(["train", *_as_options(settings), f"--name={self.name}"], log, index=machine), log

    def second_resume(self, machine: int) -> tuple[subprocess.Popen[bytes], Path]:
        """Resume this run on a machine while it lives; its process, and the file of its output."""
        log = self.testbed.folder / "second resume.log"
        return self.testbed.start(["train", "--resume", str(self.run_dir)], log, index=machine), log

    def kill(self, number: signal.Signals = signal.SIGKILL) -> float:
        """Send a signal to its driver. Returns the time of it."""
        [driver] = self.drivers()
        os.kill(driver.host_pid, number)
        return time.time()

    def drivers(self) -> list[MachineProcess]:
        """All drivers on the testbed, in the order of the machines: only this run's, unless others were started."""
        everybody = [each for machine in self.testbed.machines if machine.is_up for each in machine.processes()]
        return [each for each in everybody if " -m runtime train " in each.command]

    def stop(self) -> None:
        """End it if it was started and still runs, without waiting for it to save."""
        if self._process is not None and self.exit_code is None and self.testbed.machines[0].is_up:
            with contextlib.suppress(ValueError, ProcessLookupError):
                self.kill()
            self._started.wait(STOP_S)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._started.poll()

    @property
    def step(self) -> int:
        """The last step that it recorded."""
        return last_step(self.run_dir / METRICS)

    def events(self, name: str, since: float) -> list[dict[str, Any]]:
        """Read its events of this name since a Unix time."""
        if not (self.run_dir / EVENTS).exists():
            return []
        return [event for event in read_events(self.run_dir) if event["event"] == name and event["time"] >= since]

    def lines(self) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl of training steps, without those of repeated steps."""
        return read_metrics(self.run_dir)[0] if (self.run_dir / METRICS).exists() else []

    def superseded_lines(self) -> list[dict[str, Any]]:
        """Read the lines of training steps that were set aside because their steps were repeated."""
        return [line for line in superseded_lines(self.run_dir) if line["kind"] == "train"]

    def said(self, offset: int = 0) -> str:
        """Read what all its drivers have printed, one after the other, from an offset in characters on."""
        return self.terminal.read_text(errors="replace")[offset:]

    def wait(self, condition: Callable[[], Any], what: str, limit_s: float, *, may_end: bool = False) -> Any:
        """Wait until the condition is truthy, and return its value.

        Raises:
            Unfulfilled: it is still false after `limit_s` or at the deadline, or the run ended (unless `may_end`).
        """
        give_up = time.monotonic() + limit_s
        while not (value := condition()):
            if not may_end and self.exit_code is not None and not condition():
                raise Unfulfilled(f"{what}: the run ended with exit code {self.exit_code}: {self._last_words()}")
            if time.monotonic() > give_up:
                raise Unfulfilled(f"{what}: not after {limit_s:.0f} s")
            if time.monotonic() > self._deadline:
                raise Unfulfilled(f"{what}: not by the end of the time for all faults")
            self._on_wait(self, what)
            time.sleep(POLL_S)
        return value

    def wait_for_end(self, what: str, limit_s: float) -> None:
        """Wait until the run has ended, well or not. Raises Unfulfilled as `wait` does."""
        self.wait(lambda: self.exit_code is not None, what, limit_s, may_end=True)

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise AssertionError("the run was not started")
        return self._process

    def _begin(self, *arguments: str) -> None:
        variables = {FAULTS_VARIABLE: self._faults} if self._faults else {}
        self._process = self.testbed.start(arguments, self.terminal, variables=variables)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.said().splitlines() if re.search("error|Error", line)]
        return lines[-1] if lines else "it said nothing"


def _as_options(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def _settings(testbed: Testbed, world_size: int) -> dict[str, Any]:
    return {
        "config": "tiny",
        "run.dir": testbed.runs,
        "model.num_layers": 2,  # one of them MoE: all machines share few cores
        "run.global_batch_size": world_size,
        "run.checkpoint_every": CHECKPOINT_EVERY,
        "run.eval_every": EVAL_EVERY,
        "run.eval_sequences": world_size,
        "run.sample_prompts": '["To be", "The "]',
        "run.sample_tokens": 4,
        "balance.law": "newton",  # which records statistics too
        "data.path": testbed.folder / "source",
        "data.cache_dir": testbed.folder / "text",
        "device": "cpu",
        "workers": world_size,
        "cluster.address": testbed.address,
        "cluster.start_timeout_s": 240,  # a node that was killed is booted meanwhile
        "cluster.collective_timeout_s": COLLECTIVE_TIMEOUT_S,
    }
