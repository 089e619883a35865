"""Writes the checkpoints of a run to the disk, beside the training."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workers import checkpoint
from workers.background import Background
from workers.checkpoint import CheckpointError, DiskRefused
from workers.parallel import RankGroups
from workers.run_config import RunConfig
from workers.shares import Block
from workers.staging import Snapshot, Staging

# Between two tries of the last checkpoint on a full disk.
RETRY_S = 5.0


@dataclass(frozen=True)
class _Written:
    path: Path
    num_bytes: int
    write_s: float


class DiskSaver:
    """One rank's part; every rank calls every method at the same step.

    One checkpoint at a time is being written. When the next is due before it is complete, the training waits for it:
    which checkpoints exist never depends on how fast a disk is, and the memory taken is that of one share.

    Args:
        root: the checkpoints folder of the run.
        tell: records an event; does something on rank 0 alone.
        sync_records: forces the records of the run to the disk. Called from the thread that writes.
    """

    def __init__(
        self,
        root: Path,
        groups: RankGroups,
        run: RunConfig,
        staging: Staging,
        *,
        tell: Callable[..., None],
        sync_records: Callable[[], None],
    ) -> None:
        self._root, self._groups, self._run, self._staging = root, groups, run, staging
        self._tell, self._sync_records = tell, sync_records
        self._writer: Background[_Written] = Background("checkpoint writer")
        self._block: Block | None = None
        self._step, self._blocked_s = 0, 0.0  # of the checkpoint under way
        self.saved_step: int | None = None
        self.total_blocked_s = 0.0

    def save(self, live: Snapshot) -> None:
        """Save, as far as the disk allows; else there is an event and the training goes on.

        Raises:
            RuntimeError: a rank is gone.
        """
        begun = time.monotonic()
        self.poll(wait=True)
        if self._run.async_checkpoints:
            copy = self._copy(live)
            self._writer.start(lambda: self._write(copy))
        self._step, self._blocked_s = live.step, time.monotonic() - begun
        if not self._run.async_checkpoints:
            self._hear(lambda: self._write(live))
            self._blocked_s = time.monotonic() - begun
        self.total_blocked_s += self._blocked_s

    def poll(self, *, wait: bool = False) -> None:
        """Hear how the checkpoint under way ended, if it has. Raises RuntimeError where a rank is gone."""
        self._hear(lambda: self._writer.take(wait=wait))

    def save_last(self, live: Snapshot, give_up: threading.Event) -> None:
        """Save and wait for it. On a full disk, until there is room, until `give_up` is set anew, or the time is over.

        Raises:
            CheckpointError: on all ranks.
        """
        begun = time.monotonic()
        self.poll(wait=True)
        give_up.clear()  # a stop was the reason for this save; another one ends the wait
        self._step, waits = live.step, False
        while True:
            try:
                written = self._write(live)
                break
            except CheckpointError as error:
                patience_s = begun + self._run.full_disk_wait_s - time.monotonic()
                if not isinstance(error, DiskRefused) or not self._all_wait(patience_s, give_up):
                    self._tell("checkpoint_failed", step=live.step, reason=str(error))
                    raise
                if not waits:
                    self._tell("checkpoint_waits", step=live.step, reason=str(error), for_s=patience_s)
                    waits = True
            give_up.wait(RETRY_S)
        self._blocked_s = time.monotonic() - begun
        self.total_blocked_s += self._blocked_s
        self._tell_written(written)

    def abandon(self, wait_s: float) -> None:
        """The training has failed: leave a write that is under way to its own bounds, after some time."""
        self._writer.abandon(wait_s)

    def _copy(self, live: Snapshot) -> Snapshot:
        self._staging.divide(live.tensors)
        if self._block is None:
            self._block = Block(self._staging.shares[self._groups.rank], self._staging.device)
        self._staging.copy(live.tensors, self._block)
        return replace(live, tensors=self._block.tensors)

    def _write(self, snapshot: Snapshot) -> _Written:
        """Collective over checkpoint_group."""
        begun = time.monotonic()
        if self._block is not None:
            self._block.wait()
        self._sync_records()  # a checkpoint is never ahead of its records
        path = checkpoint.save(
            self._root,
            snapshot.step,
            snapshot.tensors,
            snapshot.extra,
            self._groups.checkpoint_group,
            self._run.keep_checkpoints,
        )
        num_bytes = 0 if self._groups.rank else sum(file.stat().st_size for file in path.iterdir())
        return _Written(path, num_bytes, time.monotonic() - begun)

    def _hear(self, outcome: Callable[[], _Written | None]) -> None:
        # `checkpoint.save` ends alike on all ranks, so that all hear the same, if not at the same time.
        try:
            if (written := outcome()) is not None:
                self._tell_written(written)
        except CheckpointError as error:
            self._tell("checkpoint_failed", step=self._step, reason=str(error))

    def _tell_written(self, written: _Written) -> None:
        self.saved_step = self._step
        details: dict[str, Any] = {"bytes": written.num_bytes, "blocked_s": self._blocked_s, "write_s": written.write_s}
        self._tell("checkpoint", step=self._step, path=str(written.path), **details)

    def _all_wait(self, patience_s: float, give_up: threading.Event) -> bool:
        """Whether no rank gives up. Collective over control_group."""
        gives_up = torch.tensor([int(patience_s <= 0 or give_up.is_set())])
        dist.all_reduce(gives_up, dist.ReduceOp.MAX, group=self._groups.control_group)
        return not gives_up.item()
