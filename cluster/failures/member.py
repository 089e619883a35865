"""A member of a gang: its actor, and how errors name it."""

import re
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from cluster.failures.errors import Kind, WorkerFailure
from workers.actor import WorkerActor

_ANSI_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # Ray puts them into the texts of its errors.


@dataclass(frozen=True, kw_only=True)
class Member:
    """An actor and where it runs, as far as that is known yet."""

    rank: int
    actor: ActorHandle[WorkerActor]
    ip: str = ""
    pid: int = 0
    device: str = ""
    node_id: str = ""
    stack_file: int = -1  # see WorkerLocation

    @property
    def name(self) -> str:
        where = ", ".join(part for part in (self.ip, f"pid {self.pid}", self.device) if part)
        return f"rank {self.rank} ({where})"

    def failed(self, kind: Kind, message: str, **details: Any) -> WorkerFailure:
        plain = _ANSI_COLOURS.sub("", message)
        return WorkerFailure(rank=self.rank, ip=self.ip, pid=self.pid, kind=kind, message=plain, **details)
