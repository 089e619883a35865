"""Says on the terminal what a chaos run does: a line for each fault, and what is being waited for."""

import time
from typing import Self

from rich.console import Console

SAY_EVERY_S = 30.0  # Between two lines about what is being waited for, where nobody looks at a terminal.


class ChaosProgress:
    """A context manager; on a terminal its last line changes in place."""

    def __init__(self, console: Console) -> None:
        self._console, self._said = console, time.monotonic()
        self._status = console.status("booting machines") if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, text: str) -> None:
        """Print a line."""
        self._said = time.monotonic()
        self._console.print(text, soft_wrap=True, markup=False)

    def wait(self, text: str) -> None:
        """Show what is being waited for; called often."""
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() > self._said + SAY_EVERY_S:
            self.tell(f"  {text}")
