"""Standard output and error that a command outlives: a terminal that was closed, a pipe whose reader has ended."""

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

GONE = (errno.EIO, errno.EPIPE)  # of a terminal; of a pipe


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, drop what is written to a pipe whose reader is gone, instead of raising: the work goes on."""
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
        # For all who write to this descriptor, those in C++ too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return memoryview(data).nbytes


def _lasting(stream: TextIO) -> TextIO:
    """Wrap a stream so that it drops such output. A stream without a file descriptor, as in a test, stays as it is."""
    try:
        number = stream.fileno()
    except (OSError, AttributeError):  # io.UnsupportedOperation is an OSError
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(number, "w", closefd=False)),
        encoding=stream.encoding,
        # A folder's name that is no text, or a letter that this terminal has not, is shown by its number.
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.isatty() or number == 2,
    )
