"""Tensors to and from files in the format of torch.distributed.checkpoint (DCP), by its planners, writer and reader.

Its `save` and `load` are not called: they agree by collectives of pickled objects, and tell every error as a
CheckpointException without its cause. Which rank writes what is known here without asking, see `workers.shares.divide`.
"""

import errno
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from workers.checkpoint_files import CheckpointCorrupt
from workers.shares import TensorSpec

# What is left on a disk on which even the smallest tensor failed: torch's writer may hide what the system said.
_FULL_BYTES = 1 << 20
_WRITER_MARKS = ("PytorchStreamWriter", "inline_container")

Piece = tuple[str, str, int, int]  # name of a tensor, the file that it is in, offset and length there


def write_share(folder: Path, share: Mapping[str, Tensor], rank: int, world_size: int) -> list[Piece]:
    """Write the tensors of one rank into a file of its own. Not collective.

    Raises:
        OSError: the disk is full or fails.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = FileSystemWriter(folder)
    planner.set_up_planner(dict(share), None, is_coordinator=rank == 0)
    writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plan = writer.prepare_global_plan([plan] * world_size)[rank]  # names the file after the rank
    try:
        results = writer.write_data(planner.finish_plan(plan), planner).value()
    except RuntimeError as error:
        raise _system_error(error, folder) from error
    places = [(result.index.fqn, result.storage_data) for result in results]
    return [(name, place.relative_path, place.offset, place.length) for name, place in places]


def write_index(folder: Path, specs: Mapping[str, TensorSpec], pieces: Sequence[Piece]) -> None:
    """Write DCP's index of all tensors, whoever wrote them."""
    entries: dict[str, Any] = {name: _entry(spec) for name, spec in specs.items()}
    results = [
        WriteResult(MetadataIndex(name, _origin(specs[name])), length, _StorageInfo(file, offset, length))
        for name, file, offset, length in pieces
    ]
    FileSystemWriter(folder).finish(Metadata(entries), [results])


def read_tensors(folder: Path, index: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, all of them whole, from files whose index was read and checked before. Not collective.

    Raises:
        OSError: the disk fails.
        CheckpointCorrupt: what lies at the place of a tensor is none.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
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


def _entry(spec: TensorSpec) -> TensorStorageMetadata:
    size = torch.Size(spec.shape)
    chunks = [ChunkStorageMetadata(offsets=_origin(spec), sizes=size)]
    return TensorStorageMetadata(properties=TensorProperties(dtype=spec.dtype), size=size, chunks=chunks)


def _origin(spec: TensorSpec) -> torch.Size:
    return torch.Size([0] * len(spec.shape))
