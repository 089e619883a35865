"""Options that several subcommands share, and `type` functions for argparse. Imports neither torch nor Ray."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

from runtime.runs.run_dir import RUNS_DIR_VARIABLE, find_run
from runtime.settings.consent import add_consent


def int_from(low: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `low`, in decimal digits."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):  # int() refuses thousands of digits
            if text.isascii() and text.isdigit() and int(text) >= low:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r:.60} must be a whole number of at least {low}")

    return read


positive = int_from(1)


def float_in(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`, both included; not NaN."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r:.60} must be a number from {low} to {high}")

    return read


def file_to_write(text: str) -> Path:
    """An argparse type: a file to write after a long measurement, checked before it. The writer makes its folder."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    folder_to_write(str(path.parent))
    return path


def folder_to_write(text: str) -> Path:
    """An argparse type: a folder to write into after a long measurement, checked before it. It need not exist yet."""
    path = Path(text).expanduser()
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must be a folder, or a new name for one, and {nearest} is a file")
    return path


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the run, which `run_of` then finds, and the options that consent to modules which only the run names."""
    parser.add_argument("run", metavar="RUN", help="the run: its directory, or its name in the folder of runs")
    add_runs_dir(parser)
    add_consent(parser)


def add_runs_dir(parser: argparse.ArgumentParser) -> None:
    """Let the command line say in which folder runs lie."""
    parser.add_argument(
        "--runs-dir",
        "--run.dir",
        dest="runs_dir",
        metavar="DIR",
        help=f"the folder of runs (the environment variable {RUNS_DIR_VARIABLE}, or runs)",
    )


def run_of(options: argparse.Namespace) -> Path:
    """The directory of the run that was named. Raises InvalidValue where there is none."""
    return find_run(options.run, options.runs_dir)


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Let the command line say which checkpoint is loaded, and on which workers."""
    parser.add_argument("--step", type=int_from(0), help="checkpoint to load (the newest)")
    parser.add_argument("--workers", type=positive, help="expert-parallel ranks, with Ray (one, in this process)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where they compute (as in training)")
