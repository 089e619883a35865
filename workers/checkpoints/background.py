"""Jobs on threads beside the training."""

import threading
from collections.abc import Callable
from concurrent import futures
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# Seconds between two rounds in which all ranks compare whether their jobs have ended.
POLL_S = 0.02


class Background(Generic[T]):
    """Runs one job at a time on a thread. A collective job must be started on all ranks, and at the same step.

    The threads are daemons: a job that is stuck in a collective does not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._job: futures.Future[T] | None = None

    def start(self, job: Callable[[], T]) -> None:
        """Start a job. `take` must have returned the result of the job before."""
        if self._job is not None:
            raise RuntimeError(f"{self._name}: the job before was not taken")
        self._job = run_on_thread(self._name, job)

    def take(self) -> T | None:
        """Return the job's result, once; None if there is no job or it still runs. Raises what the job raised."""
        if self._job is None or not self._job.done():
            return None
        job, self._job = self._job, None
        return job.result()

    def wait_on_all(self, group: dist.ProcessGroup) -> None:
        """Wait until the jobs of all ranks have ended; `take` still returns the result. Collective over `group`, gloo.

        Raises RuntimeError as soon as a rank leaves `group`. To wait for the job alone would take longer: jobs that
        wait for each other in a group of their own keep its connections open, and may fail only by its time-out.
        """
        while True:
            all_done = torch.tensor([int(self._job is None or self._job.done())])
            dist.all_reduce(all_done, dist.ReduceOp.MIN, group=group)
            if all_done.item():
                return
            if self._job is not None:
                futures.wait([self._job], POLL_S)

    def abandon(self, wait_s: float) -> bool:
        """Wait at most `wait_s` for a running job, then drop it and what it raises. Returns whether it has ended."""
        job, self._job = self._job, None
        return job is None or not futures.wait([job], wait_s).not_done


def run_on_thread(name: str, job: Callable[[], T]) -> futures.Future[T]:
    """Start a job on a daemon thread of this name."""
    outcome: futures.Future[T] = futures.Future()
    threading.Thread(target=_run, args=(job, outcome), name=name, daemon=True).start()
    return outcome


def _run(job: Callable[[], T], outcome: futures.Future[T]) -> None:
    try:
        outcome.set_result(job())
    except BaseException as error:  # noqa: BLE001 - a thread's boundary: `take` raises it where someone listens
        outcome.set_exception(error)
