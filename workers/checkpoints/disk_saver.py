"""Writes the checkpoints of a run to the disk, beside the training."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workers.checkpoints import checkpoint
from workers.checkpoints.background import Background
from workers.checkpoints.checkpoint_files import CheckpointError, DiskRefused, discard, enough_to_remove, step_of
from workers.checkpoints.shares import TensorBlock
from workers.checkpoints.staging import Snapshot, Staging
from workers.distributed.parallel import RankGroups
from workers.run_config import RunConfig

# Seconds between two attempts to write the last checkpoint on a full disk.
RETRY_S = 5.0


@dataclass(frozen=True)
class _Written:
    path: Path
    num_bytes: int
    write_s: float


class DiskSaver:
    """One rank's part of saving to the disk; every rank calls every method at the same step.

    One checkpoint is written at a time. If the next one is due before it is complete, the training waits: so which
    checkpoints there are does not depend on the speed of the disk, and the copies take the memory of one share.

    Args:
        root: the checkpoints folder of the run.
        tell: records an event, given its name and fields; does nothing on other ranks than 0.
        sync_records: forces the records of the run to the disk. The thread that writes calls it. It must not refer to
            process groups, which the thread would keep open.
    Attributes:
        saved_step: the newest step that is known to be on the disk; None before the first.
        total_blocked_s: for how long saving has made the training wait, over the run.
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
        self._block: TensorBlock | None = None
        self._step, self._blocked_s = 0, 0.0  # of the checkpoint that is being written
        self.saved_step: int | None = None
        self.total_blocked_s = 0.0

    def save(self, live: Snapshot) -> None:
        """Start to save a step. If an earlier save has failed, record an event and let the training go on.

        Raises:
            RuntimeError: a rank is gone.
        """
        begun = time.monotonic()
        self.finish()
        self._step = live.step
        snapshot = self._copy(live) if self._run.async_checkpoints else live
        self._writer.start(self._job(snapshot))
        if not self._run.async_checkpoints:
            self._writer.wait_on_all(self._groups.control_group)
        self._blocked_s = time.monotonic() - begun
        self.total_blocked_s += self._blocked_s

    def finish(self) -> None:
        """Wait until the current write has ended on all ranks, and record its outcome. Collective."""
        self._writer.wait_on_all(self._groups.control_group)
        self.poll()

    def poll(self) -> None:
        """Record the outcome of the current write, if it has ended. Raises RuntimeError where a rank is gone."""
        # `checkpoint.save` has the same outcome on all ranks, but they may learn of it at different steps: so nothing
        # collective may follow here.
        try:
            if (written := self._writer.take()) is not None:
                self._tell_written(written)
        except CheckpointError as error:
            self._tell("checkpoint_failed", step=self._step, reason=str(error))

    def save_last(self, live: Snapshot, give_up: threading.Event) -> None:
        """Save and wait for the end. If the disk is full, remove older checkpoints, and try again until there is room.

        It gives up when `give_up`, which is cleared first, is set again on any rank, or after run.full_disk_wait_s.

        Raises:
            CheckpointError: on all ranks.
        """
        begun = time.monotonic()
        self.finish()
        give_up.clear()  # the first stop request led to this save; a second one ends the waiting
        self._step, told = live.step, False
        while True:
            try:
                written = self._job(live, make_room=self._remove_oldest)()
                break
            except CheckpointError as error:
                patience_s = begun + self._run.full_disk_wait_s - time.monotonic()
                if not isinstance(error, DiskRefused) or not self._all_wait(patience_s, give_up):
                    self._tell("checkpoint_failed", step=live.step, reason=str(error))
                    raise
                if not told:
                    self._tell("checkpoint_waits", step=live.step, reason=str(error), for_s=patience_s)
                    told = True
            give_up.wait(RETRY_S)
        self._blocked_s = time.monotonic() - begun
        self.total_blocked_s += self._blocked_s
        self._tell_written(written)

    def abandon(self, wait_s: float) -> None:
        """Wait at most `wait_s` for the current write, then drop it: the training has failed."""
        self._writer.abandon(wait_s)

    def _copy(self, live: Snapshot) -> Snapshot:
        self._staging.divide(live.tensors)
        if self._block is None:
            self._block = TensorBlock(self._staging.shares[self._groups.rank], self._staging.device)
        self._staging.copy(live.tensors, self._block)
        return replace(live, tensors=self._block.tensors)

    def _job(self, snapshot: Snapshot, make_room: Callable[[int], None] | None = None) -> Callable[[], _Written]:
        # The job refers to one group only. Its thread may wait for a rank that is gone; if it referred to the other
        # groups, it would keep them open, and other ranks learn of a failure when groups close.
        return partial(
            _write,
            snapshot,
            self._block,
            self._root,
            self._groups.checkpoint_group,
            keep=self._run.keep_checkpoints,
            sync_records=self._sync_records,
            make_room=make_room,
        )

    def _remove_oldest(self, missing_bytes: int) -> None:
        """On rank 0: make room for the last checkpoint, if that is possible while one of the older ones stays."""
        if paths := enough_to_remove(self._root, missing_bytes):
            steps = [step_of(path) for path in paths]
            self._tell("checkpoints_removed", step=self._step, removed=steps, missing_bytes=missing_bytes)
            for path in paths:
                discard(path)

    def _tell_written(self, written: _Written) -> None:
        self.saved_step = self._step
        details: dict[str, Any] = {"bytes": written.num_bytes, "blocked_s": self._blocked_s, "write_s": written.write_s}
        self._tell("checkpoint", step=self._step, path=str(written.path), **details)

    def _all_wait(self, patience_s: float, give_up: threading.Event) -> bool:
        """Whether all ranks are willing to wait on. Collective over control_group."""
        gives_up = torch.tensor([int(patience_s <= 0 or give_up.is_set())])
        dist.all_reduce(gives_up, dist.ReduceOp.MAX, group=self._groups.control_group)
        return not gives_up.item()


def _write(
    snapshot: Snapshot,
    block: TensorBlock | None,
    root: Path,
    group: dist.ProcessGroup,
    *,
    keep: int,
    sync_records: Callable[[], None],
    make_room: Callable[[int], None] | None,
) -> _Written:
    """Write a checkpoint, and say how long it took. Collective over `group`."""
    begun = time.monotonic()
    if block is not None:
        block.wait()
    sync_records()  # first: a run resumed from this checkpoint must find the records up to its step
    path = checkpoint.save(root, snapshot.step, snapshot.tensors, snapshot.extra, group, keep, make_room=make_room)
    num_bytes = 0 if dist.get_rank(group) else sum(file.stat().st_size for file in path.iterdir())
    return _Written(path, num_bytes, time.monotonic() - begun)
