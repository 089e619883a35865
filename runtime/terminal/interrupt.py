"""Ctrl-C, SIGTERM and SIGHUP: as a wish to save and stop while a run trains, else as an orderly end."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from cluster.machine.deferred_signals import STOP_SIGNALS

# `timeout` and schedulers send the same signal to a process and then to its group: within microseconds. No hand is as
# quick; a held Ctrl-C repeats every 30 ms.
ECHO_S = 0.015


class Stopped(KeyboardInterrupt):
    """A signal ended a command before its work was done."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = exit_code_of(number)


def exit_code_of(number: int) -> int:
    """What a shell tells of a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + number


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that it is cleaned up after; Stopped says which it was.

    SIGHUP stays ignored where nohup did so. On another thread than the main one, nothing is changed.
    """
    received = [signal.SIGINT.value]

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise Stopped(number)

    is_main = threading.current_thread() is threading.main_thread()
    handled = [each for each in STOP_SIGNALS if is_main and signal.getsignal(each) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as error:  # Ray raises one of its own where ours ended its wait
        raise error if isinstance(error, Stopped) else Stopped(received[-1]) from None
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


class StopSignal:
    """While it is entered, the first signal sets `stop_requested`; a second Ctrl-C or SIGTERM raises Stopped.

    SIGTERM is what schedulers send before they take the machine, SIGHUP what a terminal sends that goes away: often
    twice, so it never counts as the second. Use it on the main thread.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._stop_now: int | None = None
        self._presses, self._last_s = 0, -ECHO_S
        self._before: dict[signal.Signals, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a command that stopped in order; 0 if no signal came."""
        return 0 if self.number is None else exit_code_of(self.number)

    def __enter__(self) -> Self:
        # Python calls a handler when it can, and once for all of a kind that came meanwhile: in Ray's waits that is
        # long enough for two. What arrives here is counted on a thread, as it comes.
        self._arrivals, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        kept = [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in kept}
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._sender.close()
        self._thread.join()
        self._arrivals.close()
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(self._stop_now or self.number or signal.SIGINT) from None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._stop_now is not None:
            raise Stopped(self._stop_now)

    def _count(self) -> None:
        while self._stop_now is None and (arrived := self._arrivals.recv(1)):
            if arrived[0] in (signal.SIGINT, signal.SIGTERM):
                now = time.monotonic()
                self._presses += now - self._last_s >= ECHO_S
                self._last_s = now
                if self._presses == 2:
                    self._stop_now = arrived[0]
                    # Its handler may have run before it was counted.
                    signal.pthread_kill(threading.main_thread().ident or 0, self._stop_now)
