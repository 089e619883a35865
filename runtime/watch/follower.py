"""Reads on in all runs, on one thread: requests answer from what it has read, and never wait for it."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from runtime.watch.watched_run import WatchedRun

POLL_S = 0.5
_BREATH_S = 0.002  # between two parts of a long file
_MAX_PAUSE_S = 1.0  # for requests that follow each other

_logger = logging.getLogger(__name__)


class Turns:
    """Lets a request have the interpreter for itself: two threads that take turns are slow, both of them."""

    def __init__(self) -> None:
        self._changed, self._num_asking = threading.Condition(), 0

    @contextmanager
    def asking(self) -> Iterator[None]:
        """A request is being answered."""
        with self._changed:
            self._num_asking += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_asking -= 1
                self._changed.notify_all()

    def wait(self) -> None:
        """Wait until no request is being answered, or not much longer."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_asking == 0, _MAX_PAUSE_S)


class Follower:
    """A context manager: within it, the runs are followed."""

    def __init__(self, runs: Sequence[WatchedRun], turns: Turns | None = None, *, poll_s: float = POLL_S) -> None:
        self._runs, self._turns, self._poll_s = runs, turns or Turns(), poll_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> Self:
        for run in self._runs:
            self._poll(run)  # so that the first request finds something
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            there_is_more = [self._poll(run) for run in self._runs]
            wait_s = _BREATH_S if any(there_is_more) else self._poll_s

    def _poll(self, run: WatchedRun) -> bool:
        self._turns.wait()
        try:
            run.poll()
            return run.is_behind
        except OSError as error:  # a file server that is away comes back
            _logger.warning("%s cannot be read now: %s", run.path, error)
            return False
        except Exception:  # the boundary of the thread: one odd run must not stop the others
            _logger.exception("%s could not be read on", run.path)
            return False
