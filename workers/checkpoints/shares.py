"""Divides the training state among the ranks for saving: every tensor belongs to the share of exactly one rank.

Dense parameters are held by every rank, experts by some. Each name is saved by the one of its holders that has the
fewest bytes so far. It copies its share into one block, which a thread can write or send while the training changes the
original tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.values import all_gather_values

# Alignment of each tensor in a block: a view of any dtype is allowed there, and no two share a cache line.
_ALIGN_BYTES = 64


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"

    @property
    def num_bytes(self) -> int:
        """Bytes of the values, without alignment."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Shape and dtype of each tensor, by name."""
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def all_gather_specs(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[dict[str, TensorSpec]]:
    """Shapes and dtypes of every rank's tensors, by rank. Collective over `group`; None for a single process."""
    mine = {name: (spec.shape, str(spec.dtype).removeprefix("torch.")) for name, spec in specs_of(tensors).items()}
    return all_gather_values(mine, group, _read_specs)


def _read_specs(value: dict[str, Any]) -> dict[str, TensorSpec]:
    return {name: _read_spec(shape, dtype) for name, (shape, dtype) in value.items()}


def _read_spec(shape: Any, dtype_name: Any) -> TensorSpec:
    dtype = getattr(torch, dtype_name)
    if not isinstance(dtype, torch.dtype) or any(type(size) is not int or size < 0 for size in shape):
        raise TypeError("the shape and the dtype of a tensor are expected")
    return TensorSpec(tuple(shape), dtype)


def divide(held_by_rank: Sequence[Mapping[str, TensorSpec]]) -> list[dict[str, TensorSpec]]:
    """Assign every name to one rank that holds it, with about equal bytes per rank where there is a choice.

    A pure function: all ranks compute the same shares.
    """
    holders: dict[str, list[int]] = {}
    for rank, held in enumerate(held_by_rank):
        for name in held:
            holders.setdefault(name, []).append(rank)
    shares: list[dict[str, TensorSpec]] = [{} for _ in held_by_rank]
    num_bytes = [0] * len(held_by_rank)
    # First the names with few holders, then large tensors: the small ones, which any rank can take, even out the rest.
    specs = {name: held_by_rank[ranks[0]][name] for name, ranks in holders.items()}
    for name in sorted(holders, key=lambda n: (len(holders[n]), -specs[n].num_bytes, n)):
        owner = min(holders[name], key=lambda rank: (num_bytes[rank], rank))
        shares[owner][name] = specs[name]
        num_bytes[owner] += specs[name].num_bytes
    return shares


def block_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes that these tensors take in a block, with their alignment."""
    return sum(map(_aligned, specs.values()))


def _aligned(spec: TensorSpec) -> int:
    return -(-spec.num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


class TensorBlock:
    """One buffer in host memory for some tensors: filled again and again, and sent or written as a whole.

    Attributes:
        tensors: by name, views of the block; they change with the next `fill`.
        bytes: the whole block, uint8 (num_bytes,), with the tensors in the order of `specs`.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], device: torch.device) -> None:
        """device: where the tensors come from; for a GPU the block is pinned."""
        # Zeros and not `empty`: the gaps between the tensors are sent too, and are part of the checksum.
        self.bytes = torch.zeros(block_bytes(specs), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.tensors: dict[str, Tensor] = {}
        start = 0
        for name, spec in specs.items():
            raw = self.bytes[start : start + spec.num_bytes]
            self.tensors[name] = raw.view(spec.dtype).view(spec.shape)
            start += _aligned(spec)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, live: Mapping[str, Tensor], stream: torch.cuda.Stream | None = None) -> torch.cuda.Event | None:
        """Copy the current values of those tensors of the block that are in `live`.

        On a GPU this only starts the copies on `stream`, after all kernels that were launched before, and returns an
        event that is recorded after them. A stream that changes the live tensors must wait for this event; call `wait`
        before the block is read.
        """
        names = self.tensors.keys() & live.keys()
        if stream is None or self._copied is None:
            for name in names:
                self.tensors[name].copy_(live[name])
            return None
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for name in names:
                self.tensors[name].copy_(live[name], non_blocking=True)
            self._copied.record(stream)
        return self._copied

    def wait(self) -> None:
        """Wait until the copies that `fill` started have arrived. Blocks the host; may be called from any thread."""
        if self._copied is not None:
            self._copied.synchronize()
