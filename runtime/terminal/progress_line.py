"""What a long command says while it works: a line that changes in place on a terminal, several lines elsewhere."""

import shutil
import time
from typing import Self, TextIO

MINOR_EVERY_S = 30.0  # between two minor lines in a log, where each of them stays
_ERASE_LINE = "\r\x1b[K"


class ProgressLine:
    """Writes progress to a stream. A context manager, which erases the line at its end.

    It does not use rich, whose drawing thread disturbs what is timed, and which leaves the cursor hidden if the process
    is killed.

    stream: None writes nothing, as on all ranks but one.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._in_place = stream is not None and stream.isatty()
        self._said_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_place:
            self._write(_ERASE_LINE)

    def show(self, text: str) -> None:
        """Say what is done now: on a terminal until the next text, elsewhere in a line."""
        if self._in_place:
            # A longer text would wrap, and only its last row would be erased.
            width = shutil.get_terminal_size().columns - 1
            self._write(f"{_ERASE_LINE}{text[:width]}")
        else:
            self.tell(text)

    def show_minor(self, text: str) -> None:
        """Say how far it is; may be called often. Outside a terminal it is a line every MINOR_EVERY_S at most."""
        if self._in_place or time.monotonic() > self._said_s + MINOR_EVERY_S:
            self.show(text)

    def tell(self, text: str) -> None:
        """Write a line that stays."""
        self._said_s = time.monotonic()
        self._write(f"{_ERASE_LINE * self._in_place}{text}\n")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()
