"""Starts further drivers on a run that is being written. Each must be refused, and the run must stay unharmed."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.commands.chaos.plan import ChaosFault
from runtime.commands.chaos.target import TargetRun, Unfulfilled
from workers.record.run_log import EVENTS, read_events

REFUSE_S = 60.0  # For a command to refuse: before that it has only to import torch.
PROMISE = r"is being written by pid \d+ on |exists already; choose another --name"
StartedDriver = tuple[subprocess.Popen[bytes], Path]  # and the file that it prints to
WRITER_EVENTS = {"started", "resumed", "failed", "gave_up", "interrupted", "finished"}


def second_writer(run: TargetRun, fault: ChaosFault) -> float:
    """Start two more drivers on the run, each on another machine. Both must be refused."""
    struck = time.time()
    machines = (fault.machine, (fault.machine + 1) % len(run.testbed.machines))
    refuse(run, lambda: [run.second_start(machines[0]), run.second_resume(machines[1])])
    events = [each["event"] for each in read_events(run.run_dir) if each["time"] >= struck]
    if wrong := WRITER_EVENTS.intersection(events):
        raise Unfulfilled(f"a second writer wrote {', '.join(sorted(wrong))} into {EVENTS}")
    return struck


def refuse(run: TargetRun, start: Callable[[], Sequence[StartedDriver]]) -> None:
    """Start other drivers on the run; each must be refused and leave the run's settings as they are.

    Raises:
        Unfulfilled: one was not refused, did not say why, or changed the settings. All are killed by then.
    """
    settings = run.run_dir / "config.yaml"
    before = settings.read_bytes() if settings.exists() else None
    own = {driver.host_pid for driver in run.drivers()}
    others = start()
    try:
        _await_refusals(run, others)
    finally:
        for driver in run.drivers():
            if driver.host_pid not in own:
                os.kill(driver.host_pid, signal.SIGKILL)
    if before is not None and settings.read_bytes() != before:
        raise Unfulfilled(f"a second writer changed {settings.name}")


def _await_refusals(run: TargetRun, others: Sequence[StartedDriver]) -> None:
    run.wait(lambda: all(process.poll() is not None for process, _ in others), "refusing a second writer", REFUSE_S)
    for process, log in others:
        said = " ".join(log.read_text(errors="replace").split())
        if process.returncode not in (1, 2) or not re.search(PROMISE, said):
            raise Unfulfilled(f"a second writer ended with exit code {process.returncode}, saying: {said[-300:]}")
