"""Opens files of a run directory, which may come from anybody: a pipe must not block, a link must not lead out."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: Path) -> Iterator[int | None]:
    """A descriptor of a regular file, for reading; None if the path is no regular file or cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def read_at_most(path: Path, max_bytes: int) -> bytes | None:
    """The first `max_bytes` of a file, or all of a shorter one; None if it cannot be read."""
    with opened(path) as fd:
        return None if fd is None else os.pread(fd, max_bytes, 0)


def read_between(path: Path, start: int, stop: int) -> bytes:
    """The bytes from `start` to before `stop`, as far as there are any."""
    with opened(path) as fd:
        return b"" if fd is None else os.pread(fd, stop - start, start)
