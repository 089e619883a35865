"""Writing a file at once or not at all. Needs no torch."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content`, a text in UTF-8, to a new file beside `path` and rename it: readers see the old or the new one.

    The name is random and must be new: a symbolic link that lies there already is never followed. An OSError names
    `path`.
    """
    try:
        _write(path, content)
    except OSError as error:  # of a full disk without a name, or with that of the new file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, content: str | bytes) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            # A folder's name that is no text, which a report may tell, is written by its numbers.
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
        aside.replace(path)
    except BaseException:  # a full disk, Ctrl-C
        aside.unlink(missing_ok=True)
        raise
