"""One thread that works off one job at a time while the training goes on."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs jobs on a thread of their own, one at a time and in order.

    A job that is collective must be started by all ranks at the same steps; then none waits for another's job, since
    `start` first waits for the job before. The thread is a daemon: it never keeps a process alive.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._result: list[T] = []
        self._error: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], T]) -> None:
        """Begin a job. The one before must have been taken with `take`."""
        if self._thread is not None:
            raise RuntimeError(f"{self._name}: the job before was not taken")
        self._thread = threading.Thread(target=self._run, args=(job,), name=self._name, daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> T | None:
        """The result of the job, once; None where there is none, or none yet and `wait` is False.

        Raises what the job raised. Waits as long as the job does: its collectives have their bounds.
        """
        if self._thread is None or (not wait and self._thread.is_alive()):
            return None
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        return self._result.pop()

    def abandon(self, wait_s: float) -> None:
        """Give a job that is under way some time, then leave it to its own bounds. What it raises is dropped."""
        if self._thread is not None:
            self._thread.join(wait_s)

    def _run(self, job: Callable[[], T]) -> None:
        try:
            self._result.append(job())
        except BaseException as error:  # noqa: BLE001 - a thread's boundary: `take` raises it where someone listens
            self._error = error
