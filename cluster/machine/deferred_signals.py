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
    """Hold back the first stop signal until the block ends. A second one acts at once.

    Use it around the start of Ray, which may swallow a signal, or leave processes behind, while it is half started. The
    handlers are put back at the end, whatever the block has set: Ray sets one for SIGTERM that prints a stack.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread set handlers.
        yield
        return
    received: list[int] = []
    # None: a handler that was not set in Python. A signal that is ignored stays so: nohup ignores SIGHUP on purpose.
    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    handlers = {signum: each for signum, each in handlers.items() if each not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def defer(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    for signum in handlers:
        signal.signal(signum, defer)
    try:
        yield
    finally:
        restore()
    if received:
        signal.raise_signal(received[0])
