"""What every manifest states in its own format: how many machines, their resources, and the command they run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dispatch.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class ManifestPlan:
    """A cluster to be made, and the training to be run on it."""

    name: str = "trimtab"
    """Name of cluster and job: small letters, digits, hyphens."""
    num_nodes: int
    """Machines, the head's among them."""
    gpus_per_node: int = 0
    """0: train on CPUs."""
    cpus_per_node: int = 8
    """CPUs to ask for on each machine."""
    memory_gib_per_node: int = 32
    """Memory to ask for on each machine."""
    shared_dir: str = "/shared"
    """A folder that all machines see: runs and prepared text."""
    train_arguments: tuple[str, ...] = ()
    """More options of `trimtab train`. They come after those for address, workers, device and folders, and win."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise InvalidValue(
                f"the name ({self.name!r:.60}) must be 1 to 40 small letters, digits and hyphens, as Kubernetes asks"
            )
        for field, low in (("num_nodes", 1), ("gpus_per_node", 0), ("cpus_per_node", 1), ("memory_gib_per_node", 4)):
            if getattr(self, field) < low:
                raise InvalidValue(f"{field} ({getattr(self, field)}) must be at least {low}")
        if not re.fullmatch(r"/[\w./-]+", self.shared_dir):
            raise InvalidValue(
                f"shared_dir ({self.shared_dir!r:.60}) must be an absolute path of letters, digits and ./_-"
            )

    @property
    def workers_per_node(self) -> int:
        """Workers of one machine: one for each GPU; without GPUs a single one, which computes with all cores."""
        return self.gpus_per_node or 1

    @property
    def train_command(self) -> list[str]:
        """The command line of the training."""
        return [
            *("trimtab", "train", "--cluster.address", "auto"),
            *("--cluster.num_workers", str(self.num_nodes * self.workers_per_node)),
            *self._device,
            *("--run.dir", f"{self.shared_dir}/runs", "--data.cache_dir", f"{self.shared_dir}/cache"),
            *self.train_arguments,
        ]

    @property
    def _device(self) -> list[str]:
        """Options for the device. On CPUs a worker reserves its whole machine: else Ray could place several on one."""
        if self.gpus_per_node:
            return ["--cluster.device", "cuda"]
        return ["--cluster.device", "cpu", "--cluster.cpus_per_worker", str(self.cpus_per_node)]
