"""Which rank failed first, and why: plain values, no Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dispatch.errors import UserError

Kind = Literal["died", "error", "silent", "hung", "running"]


@dataclass(frozen=True, kw_only=True)
class WorkerFailure:
    """What became of one rank of a gang that failed.

    `died`: its process is gone. `error`: it raised. `silent`: it answers nothing. `hung`: it answers, and others waited
    for it beyond the bound of a collective. `running`: it was still busy.
    """

    rank: int
    ip: str
    pid: int
    kind: Kind
    message: str
    trace: str = ""
    collateral: bool = False
    time_s: float = 0.0
    error: Exception | None = None

    @property
    def where(self) -> str:
        return f"rank {self.rank} ({self.ip}, pid {self.pid})" if self.pid else f"worker {self.rank} (not placed yet)"


class GangFailed(UserError, RuntimeError):
    """A call on all ranks failed. `first` is the cause; `failures` holds every rank's fate, the cause first."""

    def __init__(self, method: str, failures: tuple[WorkerFailure, ...]) -> None:
        super().__init__(method, failures)  # As given, so that it survives pickling.
        self.method = method
        self.failures = failures

    @property
    def first(self) -> WorkerFailure:
        return self.failures[0]

    @property
    def ranks_to_replace(self) -> tuple[int, ...]:
        """Ranks whose process is gone or cannot be trusted to come back: all but those whose call has returned."""
        return tuple(sorted(failure.rank for failure in self.failures if failure.kind != "error"))

    def __str__(self) -> str:
        lines = [f"{self.first.where} failed first, in {self.method}: {self.first.message}"]
        for other in self.failures[1:]:
            lines.append(f"  then {other.where}: {_first_line(other.message)}")
            if other.kind == "running" and other.trace:
                lines.append(other.trace)
        if self.first.trace:
            lines.append(self.first.trace)
        return "\n".join(lines)


class WorkerUnreachable(RuntimeError):
    """A control call got no answer in time: the worker has died, hangs, or its node is cut off."""


def cause_first(failures: Iterable[WorkerFailure]) -> tuple[WorkerFailure, ...]:
    """Order failures so that the cause precedes what it brought about.

    A rank that died or raised on its own account comes first, then one that no longer answers, then those whose
    connection to another rank broke, last those still at work. Arrival alone would mislead: peers often report before
    the driver learns of a death. Of ranks that all raised the same error about some of them, those come first.
    """
    failures = list(failures)
    accused = {rank for failure in failures for rank in getattr(failure.error, "ranks", ())}

    def order(failure: WorkerFailure) -> tuple[int, bool, float]:
        rank = {"died": 0, "error": 0, "hung": 1, "silent": 1, "running": 3}[failure.kind]
        return 2 if failure.collateral else rank, failure.rank not in accused, failure.time_s

    return tuple(sorted(failures, key=order))


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
