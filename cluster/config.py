"""Settings of where the ranks run. Imports neither Ray nor torch, whose imports would slow down `--help`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dispatch.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which Ray to use, how many workers to place, and how long to wait for them."""

    address: str | None = None
    """Ray cluster to join: HOST:PORT, or "auto" for the one this machine belongs to; empty starts one here."""

    allow_without_token: bool = False
    """Join also a cluster that demands no token, which runs code for whoever reaches it."""

    num_workers: int = 2
    """Expert workers, one rank each. A preset takes one for each GPU of the machine or of the joined cluster."""

    min_workers: int = 0
    """Fewest workers to start with, or to go on with after a loss; 0: num_workers, never fewer."""

    max_workers: int = 0
    """Most workers that a run grows to when the cluster has room; 0: num_workers."""

    max_restarts: int = 3
    """Restarts with no newer checkpoint between them; one more failure ends the run. Preemptions do not count."""

    replace_timeout_s: float = 30.0
    """Longest wait for a lost worker's replacement before the run goes on with fewer, where min_workers allows it."""

    grow_every_s: float = 30.0
    """Seconds between two looks whether the cluster has room for more workers."""

    threads_per_worker: int = 0
    """Compute threads of each worker; 0 divides a machine's cores by the workers placed on it."""

    cpus_per_worker: float = 1.0
    """CPUs reserved for each worker on a joined cluster; a local Ray reserves none."""

    gpus_per_worker: float | None = None
    """GPUs reserved for each worker; empty means 1 on cuda and 0 on cpu."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda, cpu, or auto: cuda if there is a GPU for every worker, else cpu."""

    start_timeout_s: float = 120.0
    """Longest wait for the workers to be placed, to start and to join."""

    collective_timeout_s: float = 60.0
    """Longest wait of one collective; a dead worker is noticed at once, this bounds one that hangs."""

    coordinator_timeout_s: float = 2.0
    """Longest wait for a reply of the coordinator; then the leader computes the bias itself, to the same bits."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise InvalidValue(f"cluster.num_workers ({self.num_workers}) must be at least 1")
        self._check_bounds()
        if self.threads_per_worker < 0:
            raise InvalidValue(f"cluster.threads_per_worker ({self.threads_per_worker}) must be 0 (automatic) or more")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InvalidValue(f"cluster.device ({self.device!r:.60}) must be auto, cpu or cuda")
        # Comparisons in this order refuse NaN too.
        if not 0 < self.cpus_per_worker < math.inf:
            raise InvalidValue(f"cluster.cpus_per_worker ({self.cpus_per_worker}) must be above 0 and finite")
        if not 0 <= (self.gpus_per_worker or 0.0) < math.inf:
            raise InvalidValue(f"cluster.gpus_per_worker ({self.gpus_per_worker}) must be at least 0 and finite")
        if self.device == "cpu" and self.gpus_per_worker:
            raise InvalidValue(
                f"cluster.gpus_per_worker ({self.gpus_per_worker}) must be 0 when cluster.device is cpu; leave it empty"
            )
        if self.device == "cuda" and self.gpus_per_worker == 0:
            raise InvalidValue(
                "cluster.gpus_per_worker (0) must be above 0 when cluster.device is cuda; leave it empty"
            )
        for name in (
            "start_timeout_s",
            "collective_timeout_s",
            "coordinator_timeout_s",
            "replace_timeout_s",
            "grow_every_s",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidValue(f"cluster.{name} ({getattr(self, name)}) must be above 0 seconds and finite")

    def _check_bounds(self) -> None:
        if self.max_restarts < 0:
            raise InvalidValue(f"cluster.max_restarts ({self.max_restarts}) must be 0 (never) or more")
        if self.min_workers and not 1 <= self.min_workers <= self.num_workers:
            raise InvalidValue(
                f"cluster.min_workers ({self.min_workers}) must be from 1 to cluster.num_workers ({self.num_workers}), "
                "or 0 to keep their number"
            )
        if self.max_workers and self.max_workers < self.num_workers:
            raise InvalidValue(
                f"cluster.max_workers ({self.max_workers}) must be at least cluster.num_workers ({self.num_workers}), "
                "or 0 to keep their number"
            )
