"""Copies a model's files into the shard of a rank, block by block, so that no tensor is in memory twice."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from workers.model.families.base import Part
from workers.model.families.stacks import with_suffix
from workers.model.hugging_face.mxfp4 import SCALES_SUFFIX, dequantise
from workers.model.hugging_face.source import SCALE_SUFFIX, ModelDirectory, SourceError, StoredTensor

BLOCK_BYTES = 16 * 2**20


@torch.no_grad()
def fill(state: Mapping[str, Tensor], source: ModelDirectory) -> None:
    """Fill the tensors of `state` in the section model; those of other sections stay as they are.

    Args:
        state: of `canonical_state`, fp32.
        source: its files are read in blocks of rows, of about BLOCK_BYTES.

    Raises:
        SourceError: a tensor holds a NaN or an infinity, or its bytes do not match its digest; names file and tensor.
    """
    for part in source.parts():
        target = state.get(f"model.{part.target}")
        if target is not None and not (part.is_copy and part.name not in source.tensors):
            fill_part = _fill_item if part.num_items else _fill_part
            fill_part(part.rows_of(target), part, source)


def _fill_part(target: Tensor, part: Part, source: ModelDirectory) -> None:
    stored = source.tensors[part.name]
    scale = source.tensors.get(part.name + SCALE_SUFFIX)
    scales = None if scale is None else _read_checked(scale)
    # Blocks of rows must hold whole heads, whose rows are reordered, and whole blocks of fp8, which share a scale.
    step = math.lcm(part.head_dim or 1, source.block[0] if source.block and scales is not None else 1)
    for first, rows in _blocks(stored, step):
        values = rows.float() if scales is None else _dequantise_fp8(rows, scales, first, source.block or (1, 1))
        if not bool(values.isfinite().all()):
            raise SourceError(f"{stored.file}: {part.name} holds a NaN or an infinity in rows {first} and following")
        target_rows = target[first : first + len(rows)]
        if part.is_copy and not torch.equal(target_rows, values):
            raise SourceError(f"{stored.file}: {part.name} is not equal to what fills {part.target}, which it copies")
        target_rows.copy_(part.to_ours(values))


def _fill_item(target: Tensor, part: Part, source: ModelDirectory) -> None:
    """Fill an item of a stack, not in blocks of rows: it may be transposed, so that its rows are our columns."""
    stored = source.tensors[part.name]
    rows = _read_checked(stored)
    if stored.dtype == torch.uint8:
        values = dequantise(rows, _read_checked(source.tensors[with_suffix(part.name, SCALES_SUFFIX)]))
        part = replace(part, is_transposed=False)  # in MXFP4 the matrix is stored as (out, in), as ours
    else:
        values = rows.float()
    if not bool(values.isfinite().all()):
        raise SourceError(f"{stored.file}: {part.name} holds a NaN or an infinity")
    target.copy_(part.to_ours(values))


def _read_checked(stored: StoredTensor) -> Tensor:
    """The whole tensor, compared with its digest."""
    return torch.cat([rows for _, rows in _blocks(stored, 1)])


def _blocks(stored: StoredTensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each block, a multiple of `step` rows; compares the digest at the end."""
    num_rows, row_bytes = stored.shape[0], stored.num_bytes // max(1, stored.shape[0])
    rows_at_once = max(1, BLOCK_BYTES // max(1, row_bytes) // step) * step
    digest = hashlib.sha256() if stored.sha256 else None
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        for first in range(0, num_rows, rows_at_once):
            raw = stored.read_bytes(file, min(rows_at_once, num_rows - first) * row_bytes)
            if digest is not None:
                digest.update(raw.numpy().data)
            yield first, raw.view(stored.dtype).view(-1, *stored.shape[1:])
    if digest is not None and digest.hexdigest() != stored.sha256:
        raise SourceError(f"{stored.file}: {stored.name} is not what was exported (its sha256 differs); fetch it again")


def _dequantise_fp8(rows: Tensor, scales: Tensor, first_row: int, block: tuple[int, int]) -> Tensor:
    """Rows of fp8 times the scale of their block, in fp32 (DeepSeek-V3, section 3.3). first_row begins a block."""
    row_scales = scales[first_row // block[0] :].repeat_interleave(block[0], 0)[: rows.shape[0]]
    return rows.float() * row_scales.repeat_interleave(block[1], 1)[:, : rows.shape[1]]
