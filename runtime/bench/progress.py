"""What a long measurement says on standard error meanwhile."""

import sys
from dataclasses import dataclass

_ERASE_LINE = "\r\x1b[K"


@dataclass(frozen=True)
class Progress:
    """In a terminal one line that is written over, with nothing to restore if the process is killed; else lines."""

    silent: bool = False

    def say(self, text: str) -> None:
        """What is done now."""
        self._write(f"{_ERASE_LINE}{text}" if sys.stderr.isatty() else f"{text}\n")

    def count(self, head: str, total: int, done: int) -> None:
        """Rounds of a known number; outside a terminal only that they begin."""
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
