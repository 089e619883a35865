"""Writes a file as a whole or not at all. Needs no torch."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to a new file beside `path` and rename it: readers see the old or the new file. Texts are UTF-8.

    The name of the new file is random, and it must not exist yet: a symbolic link that somebody has put there is never
    followed. An OSError names `path`.
    """
    try:
        _write(path, content)
    except OSError as error:  # it has no file name (a full disk), or the random one
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, content: str | bytes) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            # A report may have the name of a folder that is no valid text: its bytes are written as escapes.
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a power cut could leave the new name with an empty file
        aside.replace(path)
    except BaseException:  # a full disk, Ctrl-C
        aside.unlink(missing_ok=True)
        raise
