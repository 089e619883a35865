"""Finds the directory of a run, or names a new one. Imports neither torch nor Ray, which would slow down `--help`."""

import difflib
import os
from datetime import datetime
from pathlib import Path

from dispatch.errors import InvalidValue

RUNS_DIR = "runs"
RUNS_DIR_VARIABLE = "TRIMTAB_RUNS_DIR"
CONFIG_FILE = "config.yaml"
DATA_FILE = "data.json"  # identifies the text of the run by its content
NOW_FILE = "now.json"  # the present activity of each rank
HF_FOLDER = "hf"  # of an imported run: files of the Hugging Face model beside its weights, kept for export


def default_runs_dir() -> str:
    """The folder of runs that is used unless an option names another."""
    return os.environ.get(RUNS_DIR_VARIABLE) or RUNS_DIR


def place_of_run(run: str, runs_dir: str | None = None) -> Path:
    """The directory of a run. A bare name is looked up in the folder of runs; a path with a slash is taken as it is."""
    path = Path(run).expanduser()
    return path if path.is_absolute() or os.sep in run or run in (".", "..") else folder_of_runs(runs_dir) / run


def find_run(run: str, runs_dir: str | None = None) -> Path:
    """The directory of a run, given as a path, or as its name in `runs_dir` or the current folder.

    Raises:
        InvalidValue: no such run, with the names of those that are there; or two of that name.
    """
    folder = folder_of_runs(runs_dir)
    places = list(dict.fromkeys((place_of_run(run, runs_dir), Path(run).expanduser())))
    found = [path for path in places if (path / CONFIG_FILE).is_file()]
    if len(found) == 2 and not found[0].samefile(found[1]):
        raise InvalidValue(f"{run!r} names two runs, {found[0]} and ./{run}; give the path of the one that is meant")
    if found:
        return found[0]
    _refuse_part_of_run(Path(run).expanduser())
    names = [path.name for path in runs_in(folder)]
    near = difflib.get_close_matches(Path(run).name, names, n=3)
    known = f"did you mean {' or '.join(near)}?" if near else f"runs in {folder}/: {', '.join(names) or 'none'}"
    looked = f"neither {places[0]} nor {places[1]} holds" if len(places) == 2 else f"{places[0]} does not hold"
    elsewhere = f"; for runs in another folder give its path, or set {RUNS_DIR_VARIABLE}"
    raise InvalidValue(f"there is no run {run!r}: {looked} a {CONFIG_FILE}; {known}{elsewhere}")


def _refuse_part_of_run(path: Path) -> None:
    """Raise InvalidValue if the path is a checkpoint or another file inside a run; the error names that run."""
    run_dir = next((each for each in path.parents if path.exists() and (each / CONFIG_FILE).is_file()), None)
    if run_dir is not None:
        step = path.name.removeprefix("step_")
        chosen = f" with --step {int(step)}" if step.isdecimal() else ""
        raise InvalidValue(f"{path} is a part of the run {run_dir}; give {run_dir}{chosen} instead")


def runs_in(folder: Path) -> list[Path]:
    """The directories of the runs in a folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))


def folder_of_runs(runs_dir: str | None) -> Path:
    """The folder that an option names, else the default one."""
    return Path(runs_dir or default_runs_dir()).expanduser()


def new_run_dir(runs_dir: str, name: str | None, now: datetime) -> Path:
    """The directory of a run that starts now; does not create it. Without a name the run is named by the time."""
    return Path(runs_dir).expanduser() / (name or now.strftime("%Y%m%d-%H%M%S"))
