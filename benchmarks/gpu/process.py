"""Runs a section in a process of its own: an error on the device spoils every later call of a process.

What the section told before it failed, was killed or was interrupted is kept.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch

from benchmarks.gpu.section import SECTIONS, Figures, Setting, first_line
from benchmarks.gpu.sizes import Sizes

START = "spawn"  # a process that was forked cannot have CUDA
END_S = 30.0  # for a training that was told to stop; it saves first


@dataclass
class Outcome:
    """What became of a section. state: measured, failed or interrupted. error: why it failed, in a line."""

    state: str = "measured"
    error: str = ""
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)


def run_section(name: str, sizes: Sizes, scratch: Path | None, on_figures: Callable[[Outcome], None]) -> Outcome:
    """Measure one section and return its outcome, never raise for its sake.

    scratch: a folder on the disk to measure, None takes that of temporary files. on_figures: is told of each outcome so
    far, whose state is `interrupted` until the section ends. Ctrl-C ends the section and is raised again afterwards.
    """
    began, outcome = time.monotonic(), Outcome("interrupted")
    context = multiprocessing.get_context(START)
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="trimtab-gpu-", dir=scratch, ignore_cleanup_errors=True) as folder:
        process: BaseProcess = context.Process(target=in_process, args=(there, name, sizes, folder))
        process.start()
        there.close()
        try:
            _listen(here, outcome, began, on_figures)
            process.join()
            if outcome.state == "interrupted":
                outcome.state, outcome.error = "failed", f"its process ended with code {process.exitcode}"
        finally:
            _end(process)
            outcome.seconds = time.monotonic() - began
            on_figures(outcome)
    return outcome


def _listen(here: Connection, outcome: Outcome, began: float, on_figures: Callable[[Outcome], None]) -> None:
    """Take figures until the section says how it ended, or its process is gone."""
    while True:
        try:
            kind, value = here.recv()
        except EOFError:
            return
        if kind == "figures":
            outcome.figures, outcome.seconds = value, time.monotonic() - began
            on_figures(outcome)
        else:
            outcome.state, outcome.error = kind, value


def _end(process: BaseProcess) -> None:
    """End the section and what it started. In a terminal Ctrl-C has reached all of them."""
    if process.pid is None or not process.is_alive():
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    _, alive = psutil.wait_procs(family, END_S)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.join()


def in_process(there: Connection, name: str, sizes: Sizes, folder: str) -> None:
    """What the process of a section does."""
    signal.signal(signal.SIGTERM, interrupt)
    setting = Setting(sizes, torch.device("cuda", 0), Path(folder), lambda figures: there.send(("figures", figures)))
    try:
        SECTIONS[name].measure(setting)
    except KeyboardInterrupt:
        os._exit(1)  # not with the traceback of where it was
    except Exception as error:  # noqa: BLE001 - the boundary of a section: the others still run
        traceback.print_exc()
        there.send(("failed", first_line(error)))
    else:
        there.send(("measured", ""))


def interrupt(*_: object) -> None:
    """A handler of signals that does what Ctrl-C does."""
    raise KeyboardInterrupt
