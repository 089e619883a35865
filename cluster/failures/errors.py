"""Which rank failed first, and why: plain values, no Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dispatch.errors import UserError

Kind = Literal["died", "error", "silent", "hung", "running"]

MAX_DIAGNOSIS_CHARS = 32_000  # Of a failure's text in events.jsonl: enough for four stacks of MAX_STACK_CHARS.

# Errors of a rank that waited in vain for another one, or to whose process group a foreign process connected. The run
# itself did nothing wrong, so a restart may succeed. By name, since the modules of some of them import torch.
CAUSED_BY_OTHERS = ("CollectiveTimeout", "ControlTimeout", "StrangerConnected")


@dataclass(frozen=True, kw_only=True)
class WorkerFailure:
    """What became of one rank of a gang that failed.

    kind: `died`, its process is gone; `error`, it raised; `silent`, it does not answer; `hung`, it answers, but others
    have waited for it longer than a collective may last; `running`, it was still busy. collateral: its error is only
    that a connection to another rank broke. time_s: Unix time of the failure, 0 if unknown.
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
        """Whether the rank itself raised, and not because another rank was lost or did not come."""
        return self.kind == "error" and not self.collateral and type(self.error).__name__ not in CAUSED_BY_OTHERS

    @property
    def is_bug(self) -> bool:
        """Whether it raised an error that no user can mend: no UserError, and no failure of disk, network or memory."""
        mendable = isinstance(self.error, UserError | OSError | MemoryError)
        # By name, since this file imports no torch: torch.OutOfMemoryError, of a full GPU, is only a RuntimeError.
        return self.is_own_error and not mendable and type(self.error).__name__ != "OutOfMemoryError"


class GangFailed(UserError, RuntimeError):
    """A call on all ranks failed. `failures` describes every rank that did not succeed; the first one is the cause."""

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
            return str(self.first.error)  # written for the user, to whom rank and traceback would say nothing more
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
    """Order failures so that the cause comes before its consequences.

    First come ranks that died or raised an error of their own, then those that hang or do not answer, then those whose
    connection to another rank broke, last those still at work. The order of arrival would mislead: peers often report
    before the driver learns of a death. If all ranks raise one error that names some of them (`error.ranks`, as
    RanksDiverged does), these come first.
    """
    failures = list(failures)
    accused = {rank for failure in failures for rank in getattr(failure.error, "ranks", ())}

    def order(failure: WorkerFailure) -> tuple[int, bool, float]:
        level = {"died": 0, "error": 0, "hung": 1, "silent": 1, "running": 3}[failure.kind]
        return 2 if failure.collateral else level, failure.rank not in accused, failure.time_s

    return tuple(sorted(failures, key=order))


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
