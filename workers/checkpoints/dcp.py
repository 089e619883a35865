"""Writes and reads files in the format of torch.distributed.checkpoint (DCP), by its planner, reader and index writer.

DCP's own `save` and `load` are not used: they agree by collectives of pickled objects, and raise every error as a
CheckpointException without its cause. Here the ranks need not agree on who writes what, as
`workers.checkpoints.shares.divide` is a pure function. DCP's writer of tensors is not used either: it keeps copies of
all of them until its end.
"""

import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

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

from workers.checkpoints.background import run_on_thread
from workers.checkpoints.checkpoint_files import CheckpointCorrupt
from workers.checkpoints.shares import TensorSpec
from workers.checkpoints.slices import Slice

# torch's writer may raise a RuntimeError that hides the OSError. If fewer bytes than this are free then, the disk was
# full.
_FULL_BYTES = 1 << 20
_WRITER_MARKS = ("PytorchStreamWriter", "inline_container")  # in texts of errors of that writer

# One thread hashes and writes about 1 GB/s, one NVMe disk takes several. Small shares stay in one file.
_FILE_BYTES = 256 << 20
_MAX_FILES = 4

Piece = tuple[str, str, int, int]  # key of a tensor or slice, the file that it is in, offset and length there


class WrittenShare(NamedTuple):
    """What one rank wrote."""

    pieces: list[Piece]
    files: dict[str, tuple[int, str]]
    """Size in bytes and sha256 of each file."""


def write_share(folder: Path, share: Mapping[str, Tensor], rank: int) -> WrittenShare:
    """Write the tensors of one rank into its own files, a large share into several at the same time. Not collective.

    Each file is hashed while it is written. It takes the memory of one tensor at a time.

    Raises:
        OSError: the disk is full or fails.
    """
    parts = _divide_into_files(share)
    outcomes = [
        # The names that DCP's writer gives.
        run_on_thread("checkpoint file", partial(_write_file, folder / f"__{rank}_{number}.distcp", part))
        for number, part in enumerate(parts)
    ]
    futures.wait(outcomes)
    written = [outcome.result() for outcome in outcomes]
    return WrittenShare(
        [piece for each in written for piece in each.pieces],
        {name: entry for each in written for name, entry in each.files.items()},
    )


def _divide_into_files(share: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    num_bytes = sum(tensor.nbytes for tensor in share.values())
    sizes = [0] * max(1, min(_MAX_FILES, num_bytes // _FILE_BYTES))
    parts: list[dict[str, Tensor]] = [{} for _ in sizes]
    for key, tensor in share.items():
        smallest = sizes.index(min(sizes))
        parts[smallest][key] = tensor
        sizes[smallest] += tensor.nbytes
    return parts


def _write_file(file: Path, tensors: Mapping[str, Tensor]) -> WrittenShare:
    pieces: list[Piece] = []
    try:
        with file.open("wb") as stream:
            hashing = _HashingStream(stream)
            for key, tensor in tensors.items():
                offset = hashing.num_bytes
                torch.save(_copy_to_host(tensor.detach()), cast(BinaryIO, hashing))
                pieces.append((key, file.name, offset, hashing.num_bytes - offset))
            stream.flush()
            os.fsync(stream.fileno())
    except RuntimeError as error:
        raise _system_error(error, file.parent) from error
    return WrittenShare(pieces, {file.name: (hashing.num_bytes, hashing.sha256.hexdigest())})


def _copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, since of a view torch would save the whole storage."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


class _HashingStream:
    """Writes bytes to a file and hashes them: to read them back from the disk would take as long as to write them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.sha256.update(data)
        size = memoryview(data).nbytes
        self.num_bytes += size
        return size

    def flush(self) -> None:
        """Do nothing: torch.save calls it after every tensor, and the file is forced to the disk once, at its end."""


def write_index(folder: Path, specs: Mapping[str, TensorSpec], pieces: Sequence[Piece]) -> None:
    """Write DCP's index of all tensors. pieces: those of all ranks; a slice becomes a chunk of its tensor."""
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

    A slice may have other rows than the slices that were saved.

    Raises:
        OSError: the disk fails.
        CheckpointCorrupt: the bytes where the index places a tensor are not a tensor.
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
    """The OSError behind an error of torch's writer; `error` itself where the disk is not the cause."""
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
    """Plans to read, for each key, the parts of stored chunks that lie in its rows."""

    def create_local_plan(self) -> LoadPlan:
        index, items = cast(Metadata, self.metadata), list[ReadItem]()
        for key, tensor in self.state_dict.items():
            part = Slice.of_key(key)
            wanted = ChunkStorageMetadata(offsets=_offsets(part, tensor.dim()), sizes=tensor.size())
            entry = cast(TensorStorageMetadata, index.state_dict_metadata[part.name])
            found = create_read_items_for_chunk_list(part.name, entry, [wanted])
            # The destination is named by the key, as there may be several slices of one tensor.
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
