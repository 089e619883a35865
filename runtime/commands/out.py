"""The folder that a command writes to. Imports neither torch nor Ray, since it is checked before anything starts."""

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
