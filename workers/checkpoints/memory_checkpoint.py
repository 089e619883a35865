"""Checkpoints in the memory of the ranks: the loss of a node costs a few steps, not those since the last one on disk.

Every rank keeps two shares of a step (see workers.checkpoints.shares): its own, and that of a rank on another node,
whose partner it is. Of that other share it copies what it holds itself, such as dense parameters, from its own live
tensors; only what it lacks, such as experts and random state, is sent. There are buffers for two steps, so that one
step is always complete while the next one is copied.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.values import all_gather_values
from workers.checkpoints import checkpoint
from workers.checkpoints.background import Background
from workers.checkpoints.checkpoint_files import CheckpointError
from workers.checkpoints.shares import TensorBlock, TensorSpec, block_bytes
from workers.checkpoints.staging import Snapshot, Staging


class HeldShare(NamedTuple):
    """A share that a process has in memory: of the rank `owner` in a gang of `world_size` ranks, at `step`."""

    step: int
    owner: int
    world_size: int


def newest_recoverable(holdings_by_worker: Iterable[Sequence[HeldShare]]) -> int | None:
    """The newest step of which these processes together hold the shares of all ranks; None without any. Pure."""
    owners: dict[tuple[int, int], set[int]] = {}
    for share in chain.from_iterable(holdings_by_worker):
        owners.setdefault((share.step, share.world_size), set()).add(share.owner)
    complete = [step for (step, world_size), ranks in owners.items() if ranks == set(range(world_size))]
    return max(complete, default=None)


def partner_shift(nodes: Sequence[int], period: int) -> int:
    """The distance from each rank to its partner: rank (r + shift) mod world_size keeps the share of rank r too. Pure.

    As many ranks as possible get a partner on another node. Among such shifts one is preferred whose partners hold the
    same experts, since then hardly anything has to be sent.

    Args:
        nodes: the node of each rank. If all are on one node, or `nodes` is empty, every rank counts as a node of its
            own: a single process may still die.
        period: ranks this far apart hold the same tensors, if any do: the EP size, or the size of a replica.
    """
    if len(set(nodes)) < 2:
        nodes = range(len(nodes))

    def num_apart(shift: int) -> int:
        """How many ranks then have a partner on another node."""
        return sum(node != nodes[(rank + shift) % len(nodes)] for rank, node in enumerate(nodes))

    return max(range(1, len(nodes)), key=lambda shift: (num_apart(shift), shift % period == 0, -shift))


@dataclass
class _Kept:
    """Two shares of one step. crc_of_owner: crc32 of each block by its rank, set when both are complete, else empty."""

    own: TensorBlock
    partners: TensorBlock
    step: int = -1
    extra: dict[str, Any] = field(default_factory=dict)
    crc_of_owner: dict[int, int] = field(default_factory=dict)


class MemoryCheckpoints:
    """Memory checkpoints of one process. They outlive the gang: a process that joins the next one still has them.

    `open`, then `keep` and `take` by turns, on all ranks together. `held` may be called from any thread.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._newest: _Kept | None = None  # complete on all ranks: `keep` writes into the other one
        self._background: Background[_Kept] = Background("memory checkpoint")
        self._idle = True  # False while a thread of a gang that failed may still use the blocks
        self._layout: tuple[Any, ...] = ()
        self._rank = self._world_size = 0
        self._shift = 1
        self._transfer_bytes: tuple[int, int] = (0, 0)  # sent to the partner, and received

    def open(self, rank: int, staging: Staging, shift: int) -> None:
        """Allocate buffers for a new gang and drop the checkpoints of the one before. Not collective.

        Args:
            staging: its `divide` was called. shift: from `partner_shift`.
        """
        shares, holds, device = staging.shares, staging.holds, staging.device
        self._rank, self._world_size, self._shift = rank, len(shares), shift
        to, source = self._neighbours
        own, sent_bytes = _sent_first(shares[rank], holds[to])
        partners, received_bytes = _sent_first(shares[source], holds[rank])
        self._transfer_bytes = (sent_bytes, received_bytes)
        layout = (tuple(own.items()), tuple(partners.items()), device)
        # A thread of a gang that failed may still wait in its last exchange: it keeps the old blocks, and we make new
        # ones.
        if layout != self._layout or not self._idle:
            self._kept = [_Kept(TensorBlock(own, device), TensorBlock(partners, device)) for _ in range(2)]
            self._layout, self._idle = layout, True
        self.clear()

    def clear(self) -> None:
        """Drop all checkpoints but keep the buffers."""
        self._newest = None
        for kept in self._kept:
            kept.crc_of_owner = {}

    @property
    def num_bytes(self) -> int:
        """Memory that this process uses for checkpoints."""
        return sum(block.bytes.numel() for kept in self._kept for block in (kept.own, kept.partners))

    @property
    def sent_bytes(self) -> int:
        """What this rank sends to its partner each time."""
        return self._transfer_bytes[0]

    def keep(self, live: Snapshot, staging: Staging, group: dist.ProcessGroup) -> None:
        """Copy the state of a step, and exchange it with the partners on a thread while the training goes on.

        `take` must have been called after the exchange before. Collective over `group`, gloo, which must be used for
        nothing else.
        """
        kept = next(kept for kept in self._kept if kept is not self._newest)
        kept.crc_of_owner, kept.step, kept.extra = {}, live.step, dict(live.extra)
        for block in (kept.own, kept.partners):
            staging.copy(live.tensors, block)
        self._background.start(lambda: self._exchange(kept, group))

    def finish(self, group: dist.ProcessGroup) -> None:
        """Wait until the exchange has ended on all ranks; `take` must still be called. Collective over `group`."""
        self._background.wait_on_all(group)

    def take(self) -> None:
        """Take the outcome of the exchange, if it has ended.

        Raises:
            CheckpointError: something else arrived than was sent; the step before is still held. On all ranks.
            RuntimeError: a rank is gone.
        """
        # Only now may the other step be overwritten: whichever rank is lost from here on, its partner has its share.
        # Set here and not by the thread, since the thread of a gang that failed may end late and must change nothing.
        if (kept := self._background.take()) is not None:
            self._newest = kept

    def abandon(self) -> None:
        """Stop waiting for an exchange under way: the gang has failed, or training is over."""
        self._idle = self._background.abandon(0.0) and self._idle

    def held(self) -> list[HeldShare]:
        """List the shares that this process holds completely. Quick."""
        return [
            HeldShare(kept.step, owner, self._world_size) for kept in self._kept for owner in list(kept.crc_of_owner)
        ]

    def read(self, step: int) -> tuple[list[HeldShare], dict[str, Tensor], dict[str, Any]]:
        """Return this process's tensors of `step` and the extra values; all empty if it holds none.

        A share that was changed since it was kept is left out.
        """
        shares: list[HeldShare] = []
        tensors: dict[str, Tensor] = {}
        extra: dict[str, Any] = {}
        for kept in (kept for kept in self._kept if kept.step == step and kept.crc_of_owner):
            extra = kept.extra
            for owner, block in self._blocks(kept).items():
                if _crc32(block.bytes) == kept.crc_of_owner[owner]:
                    shares.append(HeldShare(step, owner, self._world_size))
                    tensors |= block.tensors
        return shares, tensors, extra

    @property
    def _neighbours(self) -> tuple[int, int]:
        """The rank that keeps this one's share, and the one whose share this one keeps."""
        return (self._rank + self._shift) % self._world_size, (self._rank - self._shift) % self._world_size

    def _blocks(self, kept: _Kept) -> dict[int, TensorBlock]:
        return {self._rank: kept.own, self._neighbours[1]: kept.partners}

    def _exchange(self, kept: _Kept, group: dist.ProcessGroup) -> _Kept:
        """On the thread: exchange with the partners, check what arrived, and agree on whether all ranks succeeded."""
        for block in self._blocks(kept).values():
            block.wait()
        to, source = self._neighbours
        sent_bytes, received_bytes = self._transfer_bytes
        outgoing, incoming = kept.own.bytes[:sent_bytes], kept.partners.bytes[:received_bytes]
        # A header goes first, with step, size and checksum: data of another step must not be taken for this one's.
        sent_crc = _crc32(outgoing)
        header = torch.tensor([kept.step, sent_bytes, sent_crc])
        received_header = torch.zeros_like(header)
        _exchange_tensors(header, received_header, to, source, group)
        _exchange_tensors(outgoing, incoming, to, source, group)
        received_crc = _crc32(incoming)
        is_intact = received_header.tolist() == [kept.step, received_bytes, received_crc]
        if is_intact:
            own_crc = _crc32(kept.own.bytes[sent_bytes:], sent_crc)
            partners_crc = _crc32(kept.partners.bytes[received_bytes:], received_crc)
            kept.crc_of_owner = dict(zip(self._blocks(kept), (own_crc, partners_crc), strict=True))
        all_intact = torch.tensor([int(is_intact)])
        dist.all_reduce(all_intact, dist.ReduceOp.MIN, group=group)
        if not all_intact.item():
            kept.crc_of_owner = {}
            raise CheckpointError(f"what a rank received of step {kept.step} is not what was sent (crc32 differs)")
        return kept


def write_held(memory: MemoryCheckpoints, step: int, root: Path, group: dist.ProcessGroup, *, keep: int) -> Path:
    """Write the checkpoint of `step` into `root` from the shares that the processes of `group`, gloo, hold in memory.

    Raises:
        CheckpointError: on all ranks: a share is in no process or has changed, or `checkpoint.save` failed.

    Collective. The group may have another size than the gang that had this state.
    """
    shares, tensors, extra = memory.read(step)
    gathered = all_gather_values((shares, extra), group, _read_held)
    held = [shares for shares, _ in gathered]
    if newest_recoverable(held) != step:
        names = [f"rank {share.owner} of {share.world_size}" for share in sorted({*chain.from_iterable(held)})]
        raise CheckpointError(
            f"step {step} is not whole in the memory of these processes: they have {', '.join(names) or 'nothing'}"
        )
    world_size = next(chain.from_iterable(held)).world_size
    return checkpoint.save(root, step, tensors, next(extra for _, extra in gathered if extra), group, keep, world_size)


def _read_held(value: Any) -> tuple[list[HeldShare], dict[str, Any]]:
    shares, extra = value
    if type(extra) is not dict or any(type(number) is not int for share in shares for number in share):
        raise TypeError("held shares and the extra values are expected")
    return [HeldShare(*share) for share in shares], extra


def _sent_first(
    share: Mapping[str, TensorSpec], partner_holds: Mapping[str, TensorSpec]
) -> tuple[dict[str, TensorSpec], int]:
    """The share in the order of its block, and how many bytes of it are sent.

    What the partner lacks comes first in the block, so that it can be sent in one piece.
    """
    sent = {name: share[name] for name in sorted(share.keys() - partner_holds.keys())}
    copied = {name: share[name] for name in sorted(share.keys() & partner_holds.keys())}
    return {**sent, **copied}, block_bytes(sent)


def _exchange_tensors(outgoing: Tensor, incoming: Tensor, to: int, source: int, group: dist.ProcessGroup) -> None:
    """Send to one rank and receive from another. An empty tensor is not sent: both sides know its size."""
    works = [dist.isend(outgoing, to, group)] if outgoing.numel() else []
    works += [dist.irecv(incoming, source, group)] if incoming.numel() else []
    for work in works:
        if work is not None:
            work.wait()


def _crc32(block: Tensor, before: int = 0) -> int:
    """crc32 of uint8 bytes that follow bytes whose crc32 is `before`."""
    return zlib.crc32(block.numpy().data, before)
