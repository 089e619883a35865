"""Where a command writes: a folder that is made if it is not there, and names that nothing has yet."""

from datetime import datetime
from pathlib import Path

from dispatch.errors import InvalidValue


def out_dir(name: str | Path) -> Path:
    """The folder, made if it is not there."""
    path = Path(name).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue(
            f"--out {name} cannot be made: {error.strerror}; give a folder that can be written"
        ) from error
    return path


def new_name(folder: Path, now: datetime) -> Path:
    """A name that nothing has yet: the time, with a number where two measurements end in one second."""
    stem, number = now.strftime("%Y%m%d-%H%M%S"), 1
    while (path := folder / f"{stem}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return path
