"""Where the ranks run: the cluster's part of the configuration. Imports neither Ray nor torch: `--help` stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which Ray to use, how many workers to place, and how long to wait for them."""

    address: str | None = None
    """Ray cluster to join: HOST:PORT, or "auto" for the one this machine belongs to; empty starts one here."""

    allow_without_token: bool = False
    """Join also a cluster that demands no token, which runs code for whoever reaches it."""

    num_workers: int = 2
    """Expert workers, one rank each."""

    threads_per_worker: int = 0
    """Compute threads of each worker; 0 divides a machine's cores by the workers placed on it."""

    cpus_per_worker: float = 1.0
    """CPUs reserved for each worker on a joined cluster; a Ray of its own reserves none."""

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
            raise ValueError(f"cluster.num_workers ({self.num_workers}) must be at least 1")
        if self.threads_per_worker < 0:
            raise ValueError(f"cluster.threads_per_worker ({self.threads_per_worker}) must be 0 (automatic) or more")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"cluster.device ({self.device!r}) must be auto, cpu or cuda")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cluster.cpus_per_worker ({self.cpus_per_worker}) must be above 0")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"cluster.gpus_per_worker ({self.gpus_per_worker}) must be 0 or more")
        if self.device == "cpu" and self.gpus_per_worker:
            raise ValueError(
                f"cluster.gpus_per_worker ({self.gpus_per_worker}) must be 0 when cluster.device is cpu; leave it empty"
            )
        if self.device == "cuda" and self.gpus_per_worker == 0:
            raise ValueError("cluster.gpus_per_worker (0) must be above 0 when cluster.device is cuda; leave it empty")
        for name in ("start_timeout_s", "collective_timeout_s", "coordinator_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"cluster.{name} ({getattr(self, name)}) must be above 0 seconds")
