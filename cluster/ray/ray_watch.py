"""Notices that the driver's Ray has died. Ray's own client would retry for a minute, and then abort the driver."""

from __future__ import annotations

import time
from typing import Any, Self

from cluster.machine.processes import PROC, Process, process_of
from cluster.ray.probe import ClusterUnreachable, check_answers
from dispatch.errors import UserError

# A head that restarts may be silent for this long. After 60 s Ray's client aborts the driver. Before that the ranks
# have to save (until cluster.failures.calls.SAVED_BY_S), and the driver has to say why it ends.
HEAD_SILENT_S = 25.0
PROBE_EVERY_S = 2.0
PROBE_S = 1.0  # longest wait for the head to accept a connection
ESSENTIAL = ("gcs_server", "raylet")


class RayDied(UserError, RuntimeError):
    """An essential Ray process has ended: no worker can be placed, called or replaced any more.

    since: `time.monotonic()` at its first sign.
    """

    def __init__(self, reason: str, since: float) -> None:
        super().__init__(reason, since)  # as given, so that it survives pickling
        self.reason, self.since = reason, since

    def __str__(self) -> str:
        return self.reason


class RayWatch:
    """Knows whether the Ray processes that the driver depends on are alive.

    Args:
        processes: those on this machine, by Ray's names for them.
        head: HOST:PORT of the head of a joined cluster; None for a local Ray.
    """

    def __init__(self, processes: dict[str, Process], head: str | None) -> None:
        self._processes, self._head = processes, head
        self._silent_since: float | None = None
        self._next_probe = 0.0

    @classmethod
    def of_this_process(cls) -> Self:
        """Watch the Ray that this process is connected to."""
        import ray

        node: Any = ray._private.worker._global_node  # noqa: SLF001 Ray has no public way to ask.
        started = node.all_processes
        found = {name: started[name][0].process.pid for name in ESSENTIAL if name in started}
        head = None if found else node.gcs_address
        if not found and (raylet := _pid_with(f"--raylet_socket_name={node.raylet_socket_name}")) is not None:
            found = {"raylet": raylet}
        # A pid without a process has died already. No process has the start time -1, so it counts as dead.
        return cls({name: process_of(pid) or Process(pid, -1) for name, pid in found.items()}, head)

    @property
    def reason(self) -> str | None:
        """Why this Ray counts as dead; None while it lives, or may come back."""
        for name, process in self._processes.items():
            if not process.alive:
                return (
                    f"Ray's {name} (pid {process.pid}) on this machine has died: it crashed, or something killed it, "
                    "such as the kernel for lack of memory (see dmesg)"
                )
        if self._silent_since is None or time.monotonic() - self._silent_since < HEAD_SILENT_S:
            return None
        return f"the head of the Ray cluster at {self._head} has not answered for {HEAD_SILENT_S:.0f} s"

    def check(self) -> None:
        """Raise RayDied if Ray has died. Takes some 50 us, and every PROBE_EVERY_S a connection to a joined head."""
        if self._head is not None and time.monotonic() >= self._next_probe:
            self._probe(self._head)
        if (reason := self.reason) is not None:
            raise RayDied(reason, time.monotonic() if self._silent_since is None else self._silent_since)

    def can_be_asked(self) -> bool:
        """Whether Ray's head would answer now. If not, any call of Ray's client blocks for up to a minute."""
        if self._head is not None:
            self._probe(self._head)
        return self._silent_since is None and self.reason is None

    def wait_until_it_can_be_asked(self) -> None:
        """Wait until Ray's head answers. Raises RayDied if it does not come back."""
        while not self.can_be_asked():
            self.check()
            time.sleep(PROBE_S)

    def _probe(self, head: str) -> None:
        now = time.monotonic()
        self._next_probe = now + PROBE_EVERY_S
        try:
            check_answers(head, PROBE_S)
        except ClusterUnreachable:
            self._silent_since = self._silent_since or now
        else:
            self._silent_since = None


def _pid_with(argument: str) -> int | None:
    """The process of this machine that was started with this argument."""
    for path in PROC.glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_text(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if argument in arguments:
            return int(path.parent.name)
    return None
