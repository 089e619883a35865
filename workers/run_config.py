"""How long a run is, on what batches, and how often it evaluates and saves."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    name: str | None = None
    """Name of the run and of its folder; by default the date and time of the start."""
    dir: str = "runs"
    """Folder that holds the run directories."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    steps: int = 400
    """Optimizer steps."""
    global_batch_size: int = 16
    """Sequences of one optimizer step, over all workers."""
    micro_batch_size: int = 0
    """Sequences that a worker computes at once; it accumulates gradients over the rest of its share. 0 takes the whole share."""
    eval_every: int = 100
    """Steps between evaluations; the last step always evaluates. 0 evaluates only then."""
    eval_sequences: int = 128
    """Held-out sequences of an evaluation."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step always saves. 0 saves only then."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Parameters, gate, bias and optimizer state stay float32."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"run.name ({self.name!r}) must be letters, digits, '.', '_' or '-', and names a folder")
        for field in ("steps", "global_batch_size", "eval_sequences", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise ValueError(f"run.{field} ({getattr(self, field)}) must be at least 1")
        for field in ("seed", "micro_batch_size", "eval_every", "checkpoint_every"):
            if getattr(self, field) < 0:
                raise ValueError(f"run.{field} ({getattr(self, field)}) must be at least 0")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"run.dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'")

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches of a worker's step. Raises ValueError where the sizes do not divide."""
        if self.global_batch_size % world_size:
            raise ValueError(
                f"run.global_batch_size ({self.global_batch_size}) must be a multiple of the number of workers "
                f"({world_size}); use {-(-self.global_batch_size // world_size) * world_size}"
            )
        share = self.global_batch_size // world_size
        micro = self.micro_batch_size or share
        if share % micro:
            raise ValueError(
                f"run.micro_batch_size ({micro}) must divide a worker's share of the batch ({share} sequences: "
                f"run.global_batch_size {self.global_batch_size} over {world_size} workers)"
            )
        return share // micro
