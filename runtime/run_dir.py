"""Where runs lie: find one, or name a new one. Imports neither torch nor Ray: `--help` stays quick."""

import difflib
from datetime import datetime
from pathlib import Path

from dispatch.errors import InvalidValue

RUNS_DIR = "runs"
CONFIG_FILE = "config.yaml"


def find_run(run: str, runs_dir: str = RUNS_DIR) -> Path:
    """The directory of a run, given as a path or as its name in `runs_dir`.

    Raises:
        ValueError: no such run; names those that are there.
    """
    for path in (Path(run).expanduser(), Path(runs_dir, run)):
        if (path / CONFIG_FILE).is_file():
            return path
    names = sorted(path.parent.name for path in Path(runs_dir).glob(f"*/{CONFIG_FILE}"))
    near = difflib.get_close_matches(Path(run).name, names, n=3)
    known = f"did you mean {' or '.join(near)}?" if near else f"runs in {runs_dir}/: {', '.join(names) or 'none'}"
    raise InvalidValue(f"there is no run {run!r}: neither {run} nor {runs_dir}/{run} holds a {CONFIG_FILE}; {known}")


def new_run_dir(runs_dir: str, name: str | None, now: datetime) -> Path:
    """The directory of a run that starts now; does not create it. Without a name the run is named by the time."""
    return Path(runs_dir).expanduser() / (name or now.strftime("%Y%m%d-%H%M%S"))
