"""Writes a checkpoint as files of Hugging Face, with one file in memory at a time."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoints.tensor_reader import TensorReader
from workers.model.families.base import Part
from workers.model.hugging_face.source import DIGESTS, INDEX, SINGLE, read_header

BIAS = ".router.expert_bias_E"


def write_weights(
    folder: Path,
    parts: Iterable[Part],
    dtypes: Mapping[str, torch.dtype],
    reader: TensorReader,
    max_file_bytes: int,
    kept: Path | None = None,
) -> None:
    """Write all parts into `folder`, and an index where there are several files.

    Args:
        folder: exists and is empty.
        dtypes: what each tensor is stored as, by its name in the files.
        reader: reads our tensors.
        max_file_bytes: of the tensors in one file; a larger tensor has a file of its own.
        kept: one more file of weights, which is copied as it is.
    """
    files = _plan(parts, dtypes, max_file_bytes)
    num_files = len(files) + (kept is not None)
    weight_map: dict[str, str] = {}
    for number, file_parts in enumerate(files, 1):
        name = _file_name(number, num_files)
        names = _save(folder / name, _tensors(file_parts, dtypes, reader))
        weight_map |= dict.fromkeys(names, name)
    total = sum(_num_bytes(part, dtypes) for part in itertools.chain.from_iterable(files))
    if kept is not None:
        shutil.copyfile(kept, folder / _file_name(num_files, num_files))
        stored = read_header(kept)
        weight_map |= {tensor.name: _file_name(num_files, num_files) for tensor in stored}
        total += sum(tensor.num_bytes for tensor in stored)
    if num_files > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _file_name(number: int, num_files: int) -> str:
    return SINGLE if num_files == 1 else f"model-{number:05d}-of-{num_files:05d}.safetensors"


def moved_biases(reader: TensorReader) -> list[str]:
    """Names of the selection biases that are not zero."""
    names = [name for name in reader.shapes if name.startswith("model.") and name.endswith(BIAS)]
    return [name for name in names if bool(reader.read([name])[name].any())]


def _plan(parts: Iterable[Part], dtypes: Mapping[str, torch.dtype], max_file_bytes: int) -> list[list[Part]]:
    """The parts of each file; the items of a stack are in one file."""
    files: list[list[Part]] = [[]]
    size = 0
    for _, group in itertools.groupby(parts, lambda part: part.file_name):
        stack = list(group)
        num_bytes = sum(_num_bytes(part, dtypes) for part in stack)
        if files[-1] and size + num_bytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1] += stack
        size += num_bytes
    return files


def _num_bytes(part: Part, dtypes: Mapping[str, torch.dtype]) -> int:
    return torch.Size(part.shape).numel() * dtypes[part.file_name].itemsize


def _tensors(
    parts: Iterable[Part], dtypes: Mapping[str, torch.dtype], reader: TensorReader
) -> Iterator[tuple[Part, Tensor]]:
    for target, group in itertools.groupby(parts, lambda part: f"model.{part.target}"):
        tensor = reader.read([target])[target]
        for part in group:
            rows = part.to_theirs(part.rows_of(tensor))
            yield part, stored_as(rows, dtypes[part.file_name], target).contiguous().clone()


def stored_as(rows: Tensor, dtype: torch.dtype, target: str) -> Tensor:
    """Cast to `dtype`, but a selection bias only if the cast does not round it. target: our name of the tensor."""
    narrow = rows.to(dtype)
    # In bf16 a bias would lose steps of 0.001, by which it moves (Megatron-LM #1482).
    return rows if target.endswith(BIAS) and not torch.equal(narrow.to(rows.dtype), rows) else narrow


def _save(path: Path, tensors: Iterable[tuple[Part, Tensor]]) -> list[str]:
    """Write one file; returns the names of its tensors."""
    from safetensors.torch import save_file

    digests, tensors_by_name = {}, dict[str, Tensor]()
    for part, tensor in tensors:
        digests[part.name] = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()
        if part.num_items:
            stack = tensors_by_name.setdefault(part.file_name, tensor.new_empty(part.num_items, *part.shape))
            stack[part.item].copy_(tensor)
        else:
            tensors_by_name[part.name] = tensor
    save_file(tensors_by_name, path, metadata={"format": "pt", DIGESTS: json.dumps(digests)})
    return list(tensors_by_name)
