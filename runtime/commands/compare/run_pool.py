"""Runs the runs of a comparison side by side, each in a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import runtime
from runtime.commands.compare.plan import ComparePlan, RunKey
from workers.checkpoints.checkpoint_files import step_of
from workers.record.run_log import METRICS

POLL_S = 0.2
KILL_WAIT_S = 5.0
TAIL_BYTES = 1 << 15  # read from the end of metrics.jsonl; more than its longest line


@dataclass
class ActiveRun:
    """A run that has a process now."""

    key: RunKey
    process: subprocess.Popen[bytes]
    metrics: Path
    first_step: int
    began: float = field(default_factory=time.monotonic)

    @property
    def step(self) -> int:
        """The last step that it has recorded."""
        return max(self.first_step, last_step(self.metrics))

    def stop(self) -> None:
        """Let it save and stop after the step under way; see runtime.commands.compare.one_run."""
        if self.process.stdin is not None:
            self.process.stdin.close()


@dataclass(frozen=True)
class EndedRun:
    """How a process ended. reason: why it failed; None if it saved, after its last step or because it was stopped."""

    key: RunKey
    seconds: float
    reason: str | None


class RunPool:
    """Starts the runs of `plan`, `jobs` at a time, each with `threads` compute threads.

    Use it as a context manager: processes that are left when it is exited, by an error or a second Ctrl-C, are killed.
    """

    def __init__(self, plan: ComparePlan, jobs: int, threads: int) -> None:
        self._plan, self._jobs, self._threads = plan, jobs, threads
        self.active: list[ActiveRun] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.active:
            run.stop()
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait(KILL_WAIT_S)

    def run(
        self, keys: Iterable[RunKey], *, stop_requested: Callable[[], bool], on_poll: Callable[[], None],
        on_end: Callable[[EndedRun], None],
    ) -> None:  # fmt: skip
        """Work through the runs until all have ended, or a stop was requested and the active ones have saved."""
        waiting, told = list(keys), False
        while self.active or (waiting and not stop_requested()):
            while waiting and len(self.active) < self._jobs and not stop_requested():
                self.active.append(self._start(waiting.pop(0)))
            if stop_requested() and not told:
                told = True
                for run in self.active:
                    run.stop()
            on_poll()
            time.sleep(POLL_S)
            for run in [run for run in self.active if run.process.poll() is not None]:
                self.active.remove(run)
                run.stop()
                on_end(EndedRun(run.key, time.monotonic() - run.began, self._reason(run)))

    def _start(self, key: RunKey) -> ActiveRun:
        log = self._plan.log_file(key)
        log.parent.mkdir(parents=True, exist_ok=True)
        root = str(Path(runtime.__file__).parents[1])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self._threads),
            # This tree, whatever lies in the working directory (-P) or is installed under the same names.
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        module = "runtime.commands.compare.one_run"
        command = [sys.executable, "-P", "-m", module, str(self._plan.out), key.method.slug, str(key.seed)]
        checkpoint = self._plan.newest_checkpoint(key)
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own module
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for us alone: we let the runs save
            )
        first_step = step_of(checkpoint) if checkpoint else 0
        return ActiveRun(key, process, self._plan.run_dir(key) / METRICS, first_step)

    def _reason(self, run: ActiveRun) -> str | None:
        code = run.process.returncode
        if code == 0:
            return None
        lines = self._plan.log_file(run.key).read_text(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"exit code {code}: {said}"


def last_step(metrics: Path) -> int:
    """The newest training step in a metrics.jsonl that may be growing; 0 without one."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError):
            return int(json.loads(line)["step"])
    return 0
