"""Which rank failed first, and why: plain values, no Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dispatch.errors import UserError

Kind = Literal["died", "error", "silent", "hung", "running"]

MAX_DIAGNOSIS_CHARS = 32_000  # Of what an event says of a failure: a few stacks.

# Errors of a rank that waited in vain for another, or that met a stranger in its place: the run did nothing wrong, and
# the next try may succeed.
OF_OTHERS = ("CollectiveTimeout", "ControlTimeout", "StrangerConnected")


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

    @property
    def is_own_error(self) -> bool:
        """Whether the rank raised on its own account, and not because it lost or missed another one."""
        return self.kind == "error" and not self.collateral and type(self.error).__name__ not in OF_OTHERS

    @property
    def is_bug(self) -> bool:
        """Whether it raised an error that no user can mend: no UserError, and no failure of disk, network or memory."""
        mendable = isinstance(self.error, UserError | OSError | MemoryError)
        # torch's error of a full GPU is a RuntimeError, and this file does not import torch.
        return self.is_own_error and not mendable and type(self.error).__name__ != "OutOfMemoryError"


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
    def is_bug(self) -> bool:
        """Whether the cause is a bug, so that its traceback must be shown and reported."""
        return self.first.is_bug

    def __str__(self) -> str:
        if not self.first.collateral and isinstance(self.first.error, UserError):
            return str(self.first.error)  # written for the user: neither rank nor traceback says more
        lines = [f"{self.first.where} failed first, in {self.method}: {self.first.message}"]
        for other in self.failures[1:]:
            lines.append(f"  then {other.where}: {_first_line(other.message)}")
            if other.kind != "error" and other.trace:
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
