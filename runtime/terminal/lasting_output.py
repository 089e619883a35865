"""Lets a command go on when its output cannot be written any more: a closed terminal, a pipe whose reader has ended."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

GONE = (errno.EIO, errno.EPIPE)  # a write to a closed terminal; to a pipe without a reader


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, drop output to a closed terminal or pipe instead of raising: it must not end a training run."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _LastingFile(io.FileIO):
    def write(self, data: "ReadableBuffer") -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
        # The descriptor itself is redirected: C++ code of Ray and torch writes to it, too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return memoryview(data).nbytes


def _lasting(stream: TextIO) -> TextIO:
    """Wrap a stream so that it drops such output. One without a file descriptor, as in a test, is returned as it is."""
    try:
        number = stream.fileno()
    except (OSError, AttributeError):  # io.UnsupportedOperation is an OSError
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(number, "w", closefd=False)),
        encoding=stream.encoding,
        # A folder's name that is no valid text, or a letter that the terminal's encoding lacks, must not raise.
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.isatty() or number == 2,
    )
