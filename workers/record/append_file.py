"""Appends to files without ever stopping a training run, and cuts them back when the run resumes."""

import os
from collections.abc import Sequence
from pathlib import Path

from workers.record.atomic_file import write_atomically


class AppendFile:
    """A file that is only appended to. Bytes that cannot be written are kept in memory and written later.

    Unbuffered: a reader sees every write at once, and when the process is killed no written byte is lost. It has the
    methods `write`, `flush` and `close` of a binary file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble: OSError | None = None  # why the last write failed; None if it did not
        self._backlog = bytearray()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @property
    def num_missing_bytes(self) -> int:
        """Bytes that wait in memory for space."""
        return len(self._backlog)

    def is_in_place(self) -> bool:
        """Whether the file at its path is still the one that is open."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def write(self, data: bytes) -> int:
        """Append `data` after all bytes that still wait in memory. Never raises OSError; see `trouble`."""
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        self._backlog += data
        self.flush()
        return len(data)

    def flush(self) -> None:
        """Try again to write the bytes that wait in memory."""
        try:
            while self._backlog:
                # A nearly full disk may take a part of the bytes, which must not be written twice.
                del self._backlog[: os.write(self._fd, self._backlog)]
        except OSError as error:
            self.trouble = error
        else:
            self.trouble = None

    def sync(self) -> None:
        """Force all that was written to the disk (fsync)."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            self.trouble = error

    def close(self) -> None:
        """Try once more to write the bytes that wait in memory, then drop them. Repeating it is harmless."""
        if self._fd >= 0:
            self.flush()
            os.close(self._fd)
            self._fd = -1


def move_tail(path: Path, aside: Path, offset: int, *, num_lost_bytes: int = 0) -> None:
    """Append the bytes of `path` from `offset` on to `aside`, and cut `path` there; drop the last `num_lost_bytes`.

    `path` is cut only after `aside` is on the disk: a crash in between leaves the bytes in both files.
    """
    size = path.stat().st_size
    with path.open("rb") as source:
        source.seek(offset)
        tail = source.read(size - num_lost_bytes - offset)
    if tail:
        with aside.open("ab") as target:
            target.write(tail)
            target.flush()
            os.fsync(target.fileno())
    if offset < size:
        os.truncate(path, offset)


def keep_lines(path: Path, raw: bytes, kept: Sequence[tuple[int, int]]) -> None:
    """Keep some lines of `path`, and move all others to the end of the *.superseded.jsonl beside it.

    raw: the bytes of `path`. kept: start and stop of each line to keep.
    """
    aside = path.with_name(f"{path.stem}.superseded.jsonl")
    keep_parts(path, aside, kept)
    if raw and not raw.endswith(b"\n"):
        with aside.open("ab") as file:
            file.write(b"\n")


def keep_parts(path: Path, aside: Path, kept: Sequence[tuple[int, int]], *, num_lost_bytes: int = 0) -> None:
    """Keep some parts of `path`, and move the rest to the end of `aside`; the last `num_lost_bytes` are dropped.

    kept: start and stop of each part, in order. A crash at worst leaves bytes in both files.
    """
    size, end = path.stat().st_size - num_lost_bytes, 0
    gaps = []
    for start, stop in kept:
        if start > end:
            gaps.append((end, start))
        end = stop
    if gaps:
        raw = path.read_bytes()
        with aside.open("ab") as target:
            target.write(b"".join(raw[start:stop] for start, stop in [*gaps, (end, size)]))
            target.flush()
            os.fsync(target.fileno())
        write_atomically(path, b"".join(raw[start:stop] for start, stop in kept))
    else:
        move_tail(path, aside, end, num_lost_bytes=num_lost_bytes)
