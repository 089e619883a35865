"""Reads DCP's index of a checkpoint without running code from it: it is a pickle, and may come from anybody."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from workers.checkpoints.checkpoint_files import INDEX, CheckpointCorrupt

_DCP = "torch.distributed.checkpoint"
_INDEX_TYPES = frozenset(
    {
        (f"{_DCP}.metadata", "Metadata"),
        (f"{_DCP}.metadata", "MetadataIndex"),
        (f"{_DCP}.metadata", "StorageMeta"),
        (f"{_DCP}.metadata", "TensorStorageMetadata"),
        (f"{_DCP}.metadata", "ChunkStorageMetadata"),
        (f"{_DCP}.metadata", "TensorProperties"),
        (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # its name in Python 3.13
    }
)


# What an unpickler and our checks raise for a file that is not an index.
_INVALID_INDEX = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _IndexUnpickler(pickle.Unpickler):
    """Builds the classes of DCP's index and nothing else, since a malicious file could name any function to call.

    The checksum in the manifest does not help: it lies in the same folder. BytesStorageMetadata is left out, as DCP
    unpickles such entries without restrictions.
    """

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _INDEX_TYPES:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which is not part of a tensor index")
        return super().find_class(module, name)


def read_index(path: Path, files: dict[str, tuple[int, str]], *, is_trusted: bool = False) -> Metadata:
    """DCP's index of a checkpoint. Raises CheckpointCorrupt unless it has only tensors that lie in `files`.

    files: size and sha256 by name, from the manifest. is_trusted: this process has just written the index, and need
        not check it for malice.
    """
    try:
        raw = (path / INDEX).read_bytes()
        if not is_trusted:
            _check_allocations(raw)
        index = _IndexUnpickler(io.BytesIO(raw)).load()
        if not isinstance(index, Metadata):
            raise TypeError(f"it holds a {type(index).__name__}")
        refused = _refused_entries(index, files)
    except FileNotFoundError:
        raise CheckpointCorrupt(path, INDEX, "is missing") from None
    except _INVALID_INDEX as error:
        raise CheckpointCorrupt(path, INDEX, f"is not an index of tensors ({error})") from error
    if refused:
        raise CheckpointCorrupt(path, INDEX, f"has entries that are not tensors in this folder: {refused[:3]}")
    return index


def _check_allocations(raw: bytes) -> None:
    """Refuse a pickle that would make the unpickler allocate more memory than the file has bytes.

    The unpickler believes the lengths and numbers in the file. The check takes as long as the reading itself, a few
    seconds for the index of the largest models.
    """
    for opcode, _, _ in pickletools.genops(raw):  # raises ValueError where a length goes beyond the end
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):  # places in a table that grows to any number in the file
            raise pickle.UnpicklingError(f"holds {opcode.name}, which DCP does not write")


def _refused_entries(index: Metadata, files: dict[str, tuple[int, str]]) -> list[str]:
    lengths = {chunk: info.length for chunk, info in index.storage_data.items() if _lies_in(info, files)}
    refused = [name for name, entry in index.state_dict_metadata.items() if not _is_complete(name, entry, lengths)]
    refused += [chunk.fqn for chunk in index.storage_data.keys() - lengths.keys()]
    # A name that is not a string is not printed: its repr may be endless.
    return [name[:200] if type(name) is str else f"a {type(name).__name__}" for name in refused]


def _is_complete(name: str, entry: Any, length_by_chunk: dict[MetadataIndex, int]) -> bool:
    """Whether the chunks of a tensor are all there. DCP does not check: it reads the chunks that are listed."""
    if not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.properties.dtype, torch.dtype):
        return False
    num_bytes = [chunk.sizes.numel() * entry.properties.dtype.itemsize for chunk in entry.chunks]
    lengths = [length_by_chunk.get(MetadataIndex(name, chunk.offsets), -1) for chunk in entry.chunks]
    # DCP does not compress: a chunk that claims more bytes than are stored would only make a reader allocate them.
    fits = all(0 <= claimed <= length for claimed, length in zip(num_bytes, lengths, strict=True))
    return fits and sum(num_bytes) == entry.size.numel() * entry.properties.dtype.itemsize


def _lies_in(info: Any, files: dict[str, tuple[int, str]]) -> bool:
    in_file = info.relative_path in files and 0 <= info.offset <= info.offset + info.length
    return in_file and info.offset + info.length <= files[info.relative_path][0] and not info.transform_descriptors
