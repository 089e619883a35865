"""Writes a checkpoint as files of Hugging Face, with one file in memory at a time."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoints.tensor_reader import TensorReader
from workers.model.families.base import Part
from workers.model.families.source import DIGESTS, INDEX, SINGLE

BIAS = ".router.expert_bias_E"


def write_weights(
    folder: Path, parts: Iterable[Part], dtypes: Mapping[str, torch.dtype], reader: TensorReader, max_file_bytes: int
) -> None:
    """Write all parts into `folder`, an index too where there are several files.

    Args:
        folder: exists and is empty.
        dtypes: by name of a part, what it is stored as.
        reader: holds the tensors of the parts.
        max_file_bytes: of the tensors of a file; one that is larger has a file of its own.
    """
    files = _plan(parts, dtypes, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, file_parts in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = dict(_tensors(file_parts, dtypes, reader))
        _save(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        total = sum(_num_bytes(part, dtypes) for part in itertools.chain.from_iterable(files))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def moved_biases(reader: TensorReader) -> list[str]:
    """Routers whose selection bias is not zero."""
    names = [name for name in reader.shapes if name.startswith("model.") and name.endswith(BIAS)]
    return [name for name in names if bool(reader.read([name])[name].any())]


def _plan(parts: Iterable[Part], dtypes: Mapping[str, torch.dtype], max_file_bytes: int) -> list[list[Part]]:
    files: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        num_bytes = _num_bytes(part, dtypes)
        if files[-1] and size + num_bytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(part)
        size += num_bytes
    return files


def _num_bytes(part: Part, dtypes: Mapping[str, torch.dtype]) -> int:
    return torch.Size(part.shape).numel() * dtypes[part.name].itemsize


def _tensors(
    parts: Iterable[Part], dtypes: Mapping[str, torch.dtype], reader: TensorReader
) -> Iterator[tuple[str, Tensor]]:
    for target, group in itertools.groupby(parts, lambda part: f"model.{part.target}"):
        whole = reader.read([target])[target]
        for part in group:
            rows = part.to_theirs(part.rows_of(whole))
            yield part.name, stored_as(rows, dtypes[part.name], target).contiguous().clone()


def stored_as(rows: Tensor, dtype: torch.dtype, target: str) -> Tensor:
    """In `dtype`; a selection bias, by `target`, our name, only if that does not round it."""
    narrow = rows.to(dtype)
    # A bias that moved by 0.001 would fall back in bf16 (Megatron-LM #1482): then it is stored as what it is.
    return rows if target.endswith(BIAS) and not torch.equal(narrow.to(rows.dtype), rows) else narrow


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    digests = {
        name: hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in tensors.items()
    }
    save_file(tensors, path, metadata={"format": "pt", DIGESTS: json.dumps(digests)})
