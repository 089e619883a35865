"""Lines at evenly spaced places of a long file: enough for a first picture, long before all of it has been read."""

import os
from collections.abc import Iterator
from pathlib import Path

from runtime.watch.regular_file import opened

_WINDOW_BYTES = 2**14  # read at each place; it mostly holds a whole line of a model with 61 layers
_MAX_WINDOW_BYTES = 2**18
_NUM_LAST = 8  # of the end: its last lines may be evaluations, and a training line is needed too


def spread_lines(path: Path, num: int) -> list[bytes]:
    """About `num` complete lines of a file in their order, the last ones among them."""
    with opened(path) as fd:
        if fd is None:
            return []
        size = os.fstat(fd).st_size
        return list(_lines(fd, size, num))


def last_lines(path: Path, num: int) -> list[bytes]:
    """The last `num` complete lines, fewer where they are unusually long."""
    with opened(path) as fd:
        return [] if fd is None else _lines_before(fd, os.fstat(fd).st_size, num)


def _lines(fd: int, size: int, num: int) -> Iterator[bytes]:
    last = _lines_before(fd, size, _NUM_LAST)
    end = size - sum(len(line) + 1 for line in last)
    previous = -1
    for index in range(num):
        start, line = _line_after(fd, end * index // num)
        if line is not None and previous < start < end:  # Two offsets may lie in the same line.
            previous = start
            yield line
    yield from last


def _line_after(fd: int, offset: int) -> tuple[int, bytes | None]:
    """Offset and text of the first line that begins at `offset` or behind it."""
    base = max(offset - 1, 0)  # A line that begins at `offset` has a newline just before it.
    window = _WINDOW_BYTES
    while window <= _MAX_WINDOW_BYTES:
        raw = os.pread(fd, window, base)
        start = raw.find(b"\n") + 1 if offset else 0
        if (start or not offset) and (end := raw.find(b"\n", start)) >= 0:
            return base + start, raw[start:end]
        window *= 4
    return base, None


def _lines_before(fd: int, end: int, num: int) -> list[bytes]:
    window = _WINDOW_BYTES
    while True:
        start = max(end - window, 0)
        # The last part is empty, or a line that is being written. The first is a whole line only if the window begins
        # where the file does.
        lines = os.pread(fd, end - start, start).split(b"\n")[(start > 0) : -1]
        if len(lines) >= num or start == 0 or window >= _MAX_WINDOW_BYTES:
            return lines[-num:]
        window *= 4
