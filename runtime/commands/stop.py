"""`trimtab stop RUN`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from dispatch.errors import InvalidValue, UserError
from runtime.commands.command import CommandParser
from runtime.commands.options import add_runs_dir, int_from
from runtime.runs.run_dir import find_run

if TYPE_CHECKING:
    from runtime.runs.run_lock import Owner

HELP = "Let a run save its state and end."
LOOK_EVERY_S = 0.2


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.description = (
        "Send the process that trains a run SIGTERM: it saves a checkpoint behind its present step, writes the report "
        "and ends. Waits until it has ended."
    )
    parser.add_argument("run", metavar="RUN", help="the run: its directory, or its name in the folder of runs")
    add_runs_dir(parser)
    parser.add_argument("--timeout", metavar="SECONDS", type=int_from(0), default=600, help="longest wait (600)")


def run(options: argparse.Namespace) -> int:
    """Stop the run and return the exit code."""
    from runtime.runs.run_lock import owner_of

    run_dir = find_run(options.run, options.runs_dir)
    owner = owner_of(run_dir)
    if owner is None:
        raise InvalidValue(f"nobody trains {run_dir}: there is nothing to stop")
    if not owner.is_local():
        raise UserError(f"{run_dir} is trained by {owner}; stop it there: ssh {owner.host} kill {owner.pid}")
    sys.stdout.write(f"stopping {owner}\n")
    sys.stdout.flush()
    _ask_to_stop(owner)
    until = time.monotonic() + options.timeout
    while owner_of(run_dir) == owner:
        if time.monotonic() > until:
            raise UserError(f"{owner} still saves after {options.timeout} s; a second `trimtab stop` ends it at once")
        time.sleep(LOOK_EVERY_S)
    from runtime.watch.watched_run import WatchedRun

    told = WatchedRun(run_dir).glance()
    sys.stdout.write(f"{told['state']} at step {told['step']}; go on with: trimtab train --resume {run_dir}\n")
    return 0


def _ask_to_stop(owner: Owner) -> None:
    try:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(owner.pid, signal.SIGTERM)
    except PermissionError as error:
        raise UserError(
            f"{owner} is a process of another user; ask them to stop it, or do it as root: sudo kill {owner.pid}"
        ) from error
