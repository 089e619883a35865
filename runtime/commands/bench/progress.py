"""What a long measurement says on standard error meanwhile."""

import sys
from dataclasses import dataclass

_ERASE_LINE = "\r\x1b[K"


@dataclass(frozen=True)
class BenchProgress:
    """Progress on standard error: in a terminal one line that is overwritten, elsewhere several.

    A killed process leaves nothing in the terminal to restore.
    """

    silent: bool = False

    def say(self, text: str) -> None:
        """Say what is done now."""
        self._write(f"{_ERASE_LINE}{text}" if sys.stderr.isatty() else f"{text}\n")

    def count(self, head: str, total: int, done: int) -> None:
        """Say how many of `total` rounds are done; outside a terminal only that they begin."""
        if sys.stderr.isatty() or done == 0:
            self.say(f"{head}: round {done} of {total}" if done else f"{head}: warming up, then {total} rounds")

    def end(self) -> None:
        """Leave a clean line for the results."""
        if sys.stderr.isatty():
            self._write(_ERASE_LINE)

    def _write(self, text: str) -> None:
        if not self.silent:
            sys.stderr.write(text)
            sys.stderr.flush()
