"""Decides when a run saves, on the disk and in the memory of its ranks."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from workers.checkpoints.checkpoint_files import CheckpointError
from workers.checkpoints.disk_saver import DiskSaver
from workers.checkpoints.memory_checkpoint import MemoryCheckpoints, partner_shift
from workers.checkpoints.staging import Snapshot, Staging
from workers.distributed.parallel import RankGroups
from workers.run_config import RunConfig
from workers.training.step import TrainingDiverged

# How long the ranks wait for a checkpoint that is being written when the model diverges. It can be completed then,
# since all ranks notice the divergence at the same step.
LAST_WRITE_S = 30.0


class CheckpointSaver:
    """One rank's part of saving; every rank calls every method at the same step.

    Args:
        root: the checkpoints folder of the run.
        memory: of this process, which outlives the gang.
        nodes: the node of each rank; empty where it is not known.
        tell, sync_records: see DiskSaver.
    """

    def __init__(
        self,
        root: Path,
        groups: RankGroups,
        run: RunConfig,
        optimizer: torch.optim.Optimizer,
        memory: MemoryCheckpoints,
        *,
        nodes: Sequence[int],
        tell: Callable[..., None],
        sync_records: Callable[[], None],
    ) -> None:
        self._groups, self._run, self._memory, self._tell = groups, run, memory, tell
        self._nodes = nodes or range(groups.world_size)
        self._staging = Staging(groups, optimizer)
        self._disk = DiskSaver(root, groups, run, self._staging, tell=tell, sync_records=sync_records)
        self._memory_is_open = False
        self._memory_blocked_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After any other error a rank is gone, and no collective of a write can succeed. Waiting would also delay the
        # other ranks, which learn of the failure when this rank leaves its groups.
        self._disk.abandon(LAST_WRITE_S if kind is TrainingDiverged else 0.0)
        self._memory.abandon()

    def after_step(self, step: int, snapshot: Callable[[int], Snapshot]) -> None:
        """Start the saves that are due after this step, and record how earlier ones ended.

        Blocks only for the copy of the tensors, and until an earlier save of the same kind has ended.

        Raises:
            RuntimeError: a rank is gone.
        """
        self._disk.poll()
        self._poll_memory()
        every = self._run.memory_checkpoint_every if self._groups.world_size > 1 else 0
        if every and step % every == 0:
            self._keep(snapshot(step))
        if self._run.checkpoint_every and step % self._run.checkpoint_every == 0:
            self._disk.save(snapshot(step))

    def save_last(self, live: Snapshot, give_up: threading.Event) -> None:
        """As DiskSaver.save_last, once the saves that still run have ended."""
        self._finish_memory()
        self._disk.save_last(live, give_up)

    def summary(self) -> dict[str, Any]:
        """For the event that ends a run: the step on the disk, and how long training stood still for checkpoints."""
        return {
            "saved_step": self._disk.saved_step,
            "checkpoint_blocked_s": self._disk.total_blocked_s,
            "memory_checkpoint_blocked_s": self._memory_blocked_s,
        }

    def _keep(self, live: Snapshot) -> None:
        begun = time.monotonic()
        self._finish_memory()
        if not self._memory_is_open:
            self._open_memory(live)
        self._memory.keep(live, self._staging, self._groups.memory_group)
        self._memory_blocked_s += time.monotonic() - begun

    def _open_memory(self, live: Snapshot) -> None:
        self._disk.finish()  # the shares are agreed on in checkpoint_group, which a running write would use too
        self._staging.divide(live.tensors)
        # Ranks so far apart hold the same tensors: the ranks of two replicas, or of two EP groups.
        replicas = self._groups.replicas
        period = replicas.dense.size(1) if replicas is not None else self._groups.ep_size
        shift = partner_shift(self._nodes, period)
        self._memory.open(self._groups.rank, self._staging, shift)
        self._memory_is_open = True
        sizes = {"bytes": self._memory.num_bytes, "sent_bytes": self._memory.sent_bytes}
        self._tell("memory_checkpoints", step=live.step, partner_shift=shift, **sizes)

    def _finish_memory(self) -> None:
        self._memory.finish(self._groups.control_group)
        self._poll_memory()

    def _poll_memory(self) -> None:
        try:
            self._memory.take()
        except CheckpointError as error:
            self._tell("memory_checkpoint_failed", reason=str(error))
