"""Processes of this machine, known by pid and start time: a pid may be reused by somebody else's process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One process. `started`, in clock ticks since boot, tells it from a later process with the same pid."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        now = _stat(self.pid)
        return now is not None and now.process == self and now.state != "Z"


@dataclass(frozen=True)
class _Stat:
    process: Process
    state: str
    parent: int
    session: int


def process_of(pid: int) -> Process | None:
    """The process that has this pid now; None if there is none."""
    found = _stat(pid)
    return None if found is None else found.process


def family(leader: Process) -> list[Process]:
    """Living processes of the session that `leader` opened, and all their descendants, also in other sessions.

    Members of a session may outlive its leader. As long as there is one, the kernel does not reuse the leader's pid.
    So a process with that pid and another start time means that no member is left.
    """
    everybody = [stat for pid in _pids() if (stat := _stat(pid)) is not None]
    if any(stat.process.pid == leader.pid and stat.process != leader for stat in everybody):
        return []
    members = {stat.process.pid for stat in everybody if stat.session == leader.pid}
    while more := {stat.process.pid for stat in everybody if stat.parent in members} - members:
        members |= more
    return [stat.process for stat in everybody if stat.process.pid in members and stat.state != "Z"]


def end(leader: Process, patience_s: float) -> list[Process]:
    """Ask `leader` to end its family, wait `patience_s`, and kill the rest. Returns the processes that were killed.

    May be repeated, and works after a crash of the leader.
    """
    members = family(leader)
    if leader.alive:
        _signal(leader, signal.SIGTERM)
    left = wait_gone(members, patience_s)
    # `family` again: a process that was started while the others ended is not among the members above.
    left = [process for process in {*left, *family(leader)} if process.alive]
    for process in left:
        _signal(process, signal.SIGKILL)
    wait_gone(left, patience_s)
    return left


def wait_gone(processes: Iterable[Process], limit_s: float) -> list[Process]:
    """Wait until all have ended, at most `limit_s`, and return those that have not."""
    deadline = time.monotonic() + limit_s
    while (left := [process for process in processes if process.alive]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _signal(process: Process, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signum)


def _pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]


def _stat(pid: int) -> _Stat | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold anything; after it: state, parent, group, session, ... and, 22nd, the start.
    fields = text.rpartition(")")[2].split()
    return _Stat(Process(pid, int(fields[19])), fields[0], int(fields[1]), int(fields[3]))
