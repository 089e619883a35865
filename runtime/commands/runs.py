"""`trimtab runs`."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from dispatch.errors import InvalidValue
from runtime.commands.command import CommandParser
from runtime.commands.options import add_runs_dir
from runtime.runs.run_dir import default_runs_dir, folder_of_runs, runs_in

HELP = "List runs: state, step, loss, and when each was last heard of."
WIDEST = 10_000  # characters: wider than any table, so that rich cuts no cell
DAY_S = 24 * 3600
HEADS = ("run", "state", "step", "loss", "bits/byte", "tokens/s", "last sign", "left")


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.description = "List the runs of a folder, the newest last, by what their directories hold."
    add_runs_dir(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a run, a line each")


def run(options: argparse.Namespace) -> int:
    """Print the list and return the exit code."""
    folder = folder_of_runs(options.runs_dir)
    if options.runs_dir is not None and not folder.is_dir():
        raise InvalidValue(
            f"--runs-dir {folder} must be a folder; `trimtab runs` without it lists {default_runs_dir()}/"
        )
    runs = sorted(map(_summary, runs_in(folder)), key=lambda each: each["last_time"] or 0.0)
    if options.json:
        sys.stdout.write("".join(json.dumps(each) + "\n" for each in runs))
    elif runs:
        _print_table(runs)
    else:
        if folder.is_dir():
            any(folder.iterdir())  # raises where it may not be read, which is not the same as empty
        sys.stdout.write(f"no runs in {folder}/; start one with: trimtab train\n")
    return 0


def _summary(path: Path) -> dict[str, Any]:
    from runtime.watch.watched_run import WatchedRun

    told = WatchedRun(path).glance()
    return {
        **{name: told[name] for name in ("name", "state", "step", "total_steps", "last_time", "left_s")},
        "loss": told["latest"].get("loss"),
        "val_bits_per_byte": told["last_eval"].get("val_bits_per_byte"),
        "tokens_per_s": told["mean"].get("tokens_per_s"),
    }


def _print_table(runs: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from runtime.terminal.tables import new_table

    table = new_table(HEADS, left=(0, 1))
    for each in runs:
        table.add_row(*_cells(each))
    # As wide as its cells on any terminal: a name that is cut could not be copied.
    Console(highlight=False, markup=False, emoji=False, width=WIDEST).print(table)


def _cells(run: dict[str, Any]) -> list[str]:
    from runtime.terminal.quantities import duration, short, three_digits

    since = run["last_time"] and max(time.time() - run["last_time"], 0.0)
    return [
        "".join(each if each.isprintable() else "?" for each in run["name"]),  # a folder from elsewhere
        run["state"],
        f"{run['step']}/{run['total_steps'] or '?'}",
        *("" if run[name] is None else three_digits(run[name]) for name in ("loss", "val_bits_per_byte")),
        "" if run["tokens_per_s"] is None else short(run["tokens_per_s"]),
        "" if since is None else f"{duration(since) if since < 2 * DAY_S else f'{since / DAY_S:.0f} days'} ago",
        "" if run["left_s"] is None else duration(run["left_s"]),
    ]
