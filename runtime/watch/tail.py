"""Reads the lines of a file as they are appended, and notices when what was read is no longer what the file holds."""

import os
from abc import ABC, abstractmethod
from pathlib import Path

from runtime.watch.regular_file import opened

CHUNK_BYTES = 2**20  # read at once: some hundred lines, so that requests are answered between two chunks
MAX_LINE_BYTES = 2**23  # A longer line is skipped. An event with stacks has a hundredth of that.
# The end of what was read is kept, and compared at the next read: a run that resumes cuts its files, and these may have
# grown to the same size again before they are read.
_REMEMBERED_BYTES = 256


class Rewritten(Exception):
    """The file no longer holds what was read, because the run has resumed. It must be read from its beginning."""


class Tail:
    """A reader of the lines that are appended to a file. A file that does not exist yet has no lines."""

    def __init__(self, path: Path) -> None:
        self.offset = 0  # of the first byte behind the lines that were returned
        self.size = 0  # of the file, when it was last looked at
        self._path, self._inode, self._last = path, 0, b""

    def read(self) -> list[tuple[int, bytes]]:
        """The next complete lines without their newline, each with its offset; [] if there are none.

        Raises:
            Rewritten: the file is not the one that was read; a new object must read it.
        """
        with opened(self._path) as fd:
            if fd is None:
                if self.offset:
                    raise Rewritten
                return []
            self._check(fd)
            raw = part = os.pread(fd, CHUNK_BYTES, self.offset)
            # An empty part is the end, also before `size`: a run that resumes may cut the file while it is read.
            while part and b"\n" not in raw and self.offset + len(raw) < self.size and len(raw) < MAX_LINE_BYTES:
                part = os.pread(fd, CHUNK_BYTES, self.offset + len(raw))
                raw += part
        return self._lines(raw)

    @property
    def is_at_end(self) -> bool:
        """Whether less than a chunk was left after the last read."""
        return self.size - self.offset < CHUNK_BYTES

    def _check(self, fd: int) -> None:
        status = os.fstat(fd)
        self.size = status.st_size
        before = os.pread(fd, len(self._last), self.offset - len(self._last)) if self._last else b""
        if self.size < self.offset or before != self._last or self._inode not in (0, status.st_ino):
            raise Rewritten
        self._inode = status.st_ino

    def _lines(self, raw: bytes) -> list[tuple[int, bytes]]:
        end = raw.rfind(b"\n") + 1
        if not end and len(raw) >= MAX_LINE_BYTES:
            end = len(raw)  # Skip the line. Its rest will be read as a line, and dropped since it is no JSON object.
        found, offset = [], self.offset
        for text in raw[:end].split(b"\n")[:-1]:
            found.append((offset, text))
            offset += len(text) + 1
        if end:
            self._last = raw[max(0, end - _REMEMBERED_BYTES) : end]
            self.offset += end
        return found


class LineFile(ABC):
    """A file whose lines a subclass takes as they come. One thread calls `poll`; others may call the other methods."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)

    def poll(self) -> bool:
        """Read on. Returns whether there was something new.

        Raises:
            Rewritten: the file is not the one that was read; a new object must read it.
        """
        lines = self._tail.read()
        for offset, text in lines:
            self._take(offset, text)
        return bool(lines)

    @property
    def is_at_end(self) -> bool:
        """Whether less than a chunk was left after the last read."""
        return self._tail.is_at_end

    @abstractmethod
    def _take(self, offset: int, text: bytes) -> None:
        """Take the line that begins at `offset`. It may hold anything: the file may come from anybody."""
