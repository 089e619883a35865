"""Keep the signals that ask a process to stop until it can act on them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_signals_deferred() -> Iterator[None]:
    """Hold back the first stop signal until the block ends: Ray, half started, may swallow it or leave processes.

    Leaves the handlers as they were, whatever the block has set: Ray sets one for SIGTERM that prints its own stack.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    # None: a handler that was not set in Python. A signal that is ignored stays so: nohup ignores SIGHUP on purpose.
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handlers = {number: each for number, each in handlers.items() if each not in (None, signal.SIG_IGN)}

    def keep(number: int, _frame: FrameType | None) -> None:
        pressed.append(number)
        for each, handler in handlers.items():  # A second one acts at once.
            signal.signal(each, handler)

    for number in handlers:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if pressed:
        signal.raise_signal(pressed[0])
