"""Ctrl-C, SIGTERM and SIGHUP: while a run trains they ask it to save and stop, else they end the command in order."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from cluster.machine.deferred_signals import STOP_SIGNALS

# `timeout` and schedulers send a signal twice within microseconds, to a process and then to its group. It counts once.
# A person cannot press as quickly: a held Ctrl-C repeats every 30 ms.
ECHO_S = 0.015


class Stopped(KeyboardInterrupt):
    """A signal ended a command before its work was done."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = exit_code_of(number)


def exit_code_of(number: int) -> int:
    """The exit code that a shell reports for a process ended by this signal: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    return 128 + number


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise, as Ctrl-C does, so that `finally` clauses run.

    Raises:
        Stopped: with the signal's exit code, also for Ctrl-C.

    SIGHUP stays ignored under nohup. On any thread but the main one nothing is changed: only that one may set handlers.
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
    except KeyboardInterrupt as error:  # Ray replaces our exception by a KeyboardInterrupt if it ended a wait of Ray.
        raise error if isinstance(error, Stopped) else Stopped(received[-1]) from None
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


class StopSignal:
    """A context manager: the first signal sets `stop_requested`; a second Ctrl-C or SIGTERM raises Stopped.

    Schedulers send SIGTERM before they take the machine back. A terminal that is closed sends SIGHUP, often twice, so a
    SIGHUP never counts as the second signal. Use it on the main thread.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal
        self._stop_now: int | None = None  # number of the second signal
        self._presses, self._last_s = 0, -ECHO_S  # without echoes; time of the last one (monotonic)
        self._before: dict[signal.Signals, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a command that was asked to stop and has done so; 0 if no signal came."""
        return 0 if self.number is None else exit_code_of(self.number)

    def __enter__(self) -> Self:
        # Python runs a handler only between bytecodes of the main thread, and once for all signals of a kind that came
        # meanwhile. A wait inside Ray can be long enough for two. So Python's C handler also writes each signal to a
        # socket (the wakeup descriptor), and a thread counts them as they arrive.
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
                    # Sent again, to the main thread: the handler may have run before the second signal was counted.
                    signal.pthread_kill(threading.main_thread().ident or 0, self._stop_now)
