"""Tensors to and from files in the format of torch.distributed.checkpoint (DCP), read by its planner and reader.

Its `save` and `load` are not called: they agree by collectives of pickled objects, and tell every error as a
CheckpointException without its cause. Which rank writes what is known here without asking, see
`workers.checkpoints.shares.divide`.
"""

import errno
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from workers.checkpoints.checkpoint_files import CheckpointCorrupt
from workers.checkpoints.shares import TensorSpec
from workers.checkpoints.slices import Slice

# What is left on a disk on which even the smallest tensor failed: torch's writer may hide what the system said.
_FULL_BYTES = 1 << 20
_WRITER_MARKS = ("PytorchStreamWriter", "inline_container")

Piece = tuple[str, str, int, int]  # key of a tensor or slice, the file that it is in, offset and length there


def write_share(folder: Path, share: Mapping[str, Tensor], rank: int) -> list[Piece]:
    """Write the tensors of one rank into a file of its own, one copy in memory at a time. Not collective.

    Raises:
        OSError: the disk is full or fails.
    """
    file = folder / f"__{rank}_0.distcp"  # as DCP's writer names it
    pieces: list[Piece] = []
    try:
        with file.open("wb") as stream:
            for key, tensor in share.items():
                offset = stream.tell()
                # A copy: of a view torch would save the whole storage. DCP's writer keeps all copies to its end.
                torch.save(tensor.detach().to("cpu", copy=True), stream)
                pieces.append((key, file.name, offset, stream.tell() - offset))
            stream.flush()
            os.fsync(stream.fileno())
    except RuntimeError as error:
        raise _system_error(error, folder) from error
    return pieces


def write_index(folder: Path, specs: Mapping[str, TensorSpec], pieces: Sequence[Piece]) -> None:
    """Write DCP's index of all tensors, whoever wrote them and their slices."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in specs}
    results = []
    for key, file, offset, length in sorted(pieces):
        part = Slice.of_key(key)
        chunk = _chunk(part, specs[part.name].shape)
        chunks[part.name].append(chunk)
        results.append(WriteResult(MetadataIndex(part.name, chunk.offsets), length, _StorageInfo(file, offset, length)))
    entries: dict[str, Any] = {name: _entry(spec, chunks[name]) for name, spec in specs.items()}
    FileSystemWriter(folder).finish(Metadata(entries), [results])


def read_tensors(folder: Path, index: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors and slices, by key, from files whose index was read and checked before. Not collective.

    A slice may be cut in another way than when it was saved.

    Raises:
        OSError: the disk fails.
        CheckpointCorrupt: what lies at the place of a tensor is none.
    """
    planner = _SlicePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = FileSystemReader(folder)
    planner.set_up_planner(dict(tensors), index, is_coordinator=False)
    reader.set_up_storage_reader(index, False)
    try:
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    except (pickle.UnpicklingError, RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointCorrupt(folder, "a tensor file", f"cannot be read ({type(error).__name__}: {error})") from error


def _system_error(error: RuntimeError, folder: Path) -> Exception:
    """What the system answered where torch's writer failed; `error` itself where the disk is not the cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return OSError(cause.errno, cause.strerror, cause.filename or str(folder))
        cause = cause.__cause__ or cause.__context__
    by_writer = any(mark in str(error) for mark in _WRITER_MARKS)
    if by_writer and shutil.disk_usage(folder).free < _FULL_BYTES:
        return OSError(errno.ENOSPC, "torch could not write, and there is no room left", str(folder))
    return error


class _SlicePlanner(DefaultLoadPlanner):
    """Reads of every stored chunk what lies in the rows that a key names."""

    def create_local_plan(self) -> LoadPlan:
        index, items = cast(Metadata, self.metadata), list[ReadItem]()
        for key, tensor in self.state_dict.items():
            part = Slice.of_key(key)
            wanted = ChunkStorageMetadata(offsets=_offsets(part, tensor.dim()), sizes=tensor.size())
            entry = cast(TensorStorageMetadata, index.state_dict_metadata[part.name])
            found = create_read_items_for_chunk_list(part.name, entry, [wanted])
            # By its key, as there may be several slices of one tensor.
            items += [replace(item, dest_index=MetadataIndex(key)) for item in found]
        return LoadPlan(items)


def _entry(spec: TensorSpec, chunks: list[ChunkStorageMetadata]) -> TensorStorageMetadata:
    properties = TensorProperties(dtype=spec.dtype)
    return TensorStorageMetadata(properties=properties, size=torch.Size(spec.shape), chunks=chunks)


def _chunk(part: Slice, whole: tuple[int, ...]) -> ChunkStorageMetadata:
    sizes = whole if part.stop is None else (part.stop - part.first, *whole[1:])
    return ChunkStorageMetadata(offsets=_offsets(part, len(whole)), sizes=torch.Size(sizes))


def _offsets(part: Slice, num_dims: int) -> torch.Size:
    return torch.Size([part.first, *[0] * num_dims][:num_dims])
