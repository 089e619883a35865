"""Memory and open files of the processes of a run over time, and whether they grow.

Shapes: S samples.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import psutil

ROLES = {"WorkerActor": "worker", "CoordinatorActor": "coordinator"}
# The part of a process's life that its slope leaves out: with ragged loads the largest batch so far grows for a long
# time, ever more rarely, and buffers with it.
WARM_UP = 0.75
MIN_STEPS = 500  # after the warm-up; over fewer steps noise is larger than the slope


@dataclass
class Track:
    """Samples of one process. steps, mib, files: (S,) the run's last step, memory of this process alone, open files."""

    role: str
    steps: list[int] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def slope(self, values: list[float] | list[int]) -> float:
        """Growth in 1,000 steps after the warm-up, by least squares; NaN where less than MIN_STEPS are left."""
        start = int(len(self.steps) * WARM_UP)
        steps = np.array(self.steps[start:], np.float64)
        if len(steps) < 3 or steps[-1] - steps[0] < MIN_STEPS:
            return float("nan")
        return 1000 * float(np.polyfit(steps, np.array(values[start:], np.float64), 1)[0])


@dataclass
class Tracks:
    """Samples by segment and pid, taken every `every_s` on a thread of its own while `watching`.

    The driver has a track for each segment: between two segments it writes a report of all steps, and the memory that
    this takes is no leak.
    """

    step: Callable[[], int]
    every_s: float = 2.0
    segment: int = 0
    by_process: dict[tuple[int, int], Track] = field(default_factory=dict)

    @property
    def pids(self) -> set[int]:
        """Of all processes that were seen."""
        return {pid for _, pid in self.by_process}

    @contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(self.every_s):
                self._sample()

        thread = threading.Thread(target=sample, name="soak memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def by_role(self) -> dict[str, list[Track]]:
        found = defaultdict(list)
        for track in self.by_process.values():
            found[track.role].append(track)
        return found

    def _sample(self) -> None:
        driver, step = psutil.Process(), self.step()
        for process in [driver, *driver.children(recursive=True)]:
            try:
                role = "driver" if process == driver else _role(process)
                if role is None:
                    continue
                used, files = process.memory_full_info().uss, process.num_fds()
            except psutil.Error:  # it has ended meanwhile
                continue
            track = self.by_process.setdefault((self.segment, process.pid), Track(role))
            track.steps.append(step)
            track.mib.append(used / 2**20)
            track.files.append(files)


def _role(process: psutil.Process) -> str | None:
    title = "".join(process.cmdline()[:1])  # Ray names the process of an actor "ray::WorkerActor.call"
    return next((role for name, role in ROLES.items() if name in title), None)


def wait_until_gone(pids: set[int], limit_s: float) -> set[int]:
    """Those of `pids` that still run after at most `limit_s`."""
    end = time.monotonic() + limit_s
    while left := {pid for pid in pids if psutil.pid_exists(pid)}:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return left
