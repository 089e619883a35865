"""Polls all runs on one thread. Requests are answered from what it has read, and do not wait for it."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from runtime.watch.watched_run import WatchedRun

POLL_S = 0.5
_CHUNK_PAUSE_S = 0.002  # between two chunks of a long file, so that a request can begin
_MAX_PAUSE_S = 1.0  # Requests without a gap may hold the reading up for so long, and no longer.

_logger = logging.getLogger(__name__)


class Turns:
    """Lets the reading pause while a request is answered: both would be slow if they competed for the GIL."""

    def __init__(self) -> None:
        self._changed, self._num_asking = threading.Condition(), 0

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Context in which a request is answered."""
        with self._changed:
            self._num_asking += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_asking -= 1
                self._changed.notify_all()

    def wait(self) -> None:
        """Wait until no request is being answered, at most _MAX_PAUSE_S."""
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
            wait_s = _CHUNK_PAUSE_S if any(there_is_more) else self._poll_s

    def _poll(self, run: WatchedRun) -> bool:
        self._turns.wait()
        try:
            run.poll()
            return run.is_behind
        except OSError as error:  # A file server may be away for a while: the next poll tries again.
            _logger.warning("%s cannot be read now: %s", run.path, error)
            return False
        except Exception:  # The boundary of the thread: a run that cannot be read must not stop the others.
            _logger.exception("%s could not be read further", run.path)
            return False
