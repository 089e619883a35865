"""How a row is coded while it travels: as it is, or as fp8.

Shapes: T rows (may be 0), H hidden, B bytes of a coded row.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Payload = Literal["compute", "fp8"]

TILE = 128  # elements that share a scale
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0  # the largest number of e4m3


def coded_row_bytes(hidden: int, element_bytes: int, payload: Payload) -> int:
    """Bytes of a row of `hidden` elements on its way to an expert. Rows on their way back are never coded."""
    return hidden + 4 * -(-hidden // TILE) if payload == "fp8" else element_bytes * hidden


def encode_fp8(rows_TH: Tensor) -> Tensor:
    """Code rows as e4m3 with an fp32 scale for each tile of 128 elements: uint8 (T, B), B = H + 4 * ceil(H / 128).

    As DeepSeek-V3 sends activations to their experts (arXiv 2412.19437, section 3.3). After `decode_fp8` an element x
    of a tile with largest magnitude m is off by at most max(|x| / 16, m / 458752): half a unit of 3 mantissa bits, or
    half the smallest subnormal 2^-9 times the scale m / 448. Codes travel as bytes, since gloo knows no fp8.

    A tile with a NaN or an infinity arrives as NaN throughout: e4m3 has no infinity, and other elements have no scale.
    """
    num_rows, hidden = rows_TH.shape
    num_tiles = -(-hidden // TILE)
    tiles = F.pad(rows_TH.float(), (0, num_tiles * TILE - hidden)).view(num_rows, num_tiles, TILE)
    # Divided by a tensor: CUDA replaces a division by a Python number with a product with its reciprocal, whose last
    # bit may differ from the quotient of a CPU, and the codes would depend on the device.
    largest = tiles.abs().amax(2)
    scales = largest / largest.new_full((), _FP8_MAX)
    # 0 for a tile of zeros, or of numbers so small that it underflows. A NaN stays: it makes every element a NaN, where
    # a scale of 1 would clamp the others to 448.
    scales = torch.where(scales == 0, 1.0, scales)
    # Clamped: a scale that is a subnormal number is rounded so coarsely that a quotient may exceed 448, and not every
    # cast to e4m3 saturates: some give NaN.
    codes = (tiles / scales.unsqueeze(2)).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8).flatten(1)[:, :hidden]
    return torch.cat([copy_viewed_as(codes, torch.uint8), copy_viewed_as(scales, torch.uint8)], 1)


def decode_fp8(coded_TB: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """Rows in `dtype`, (T, H), from what `encode_fp8` made."""
    codes = copy_viewed_as(coded_TB[:, :hidden], _FP8).to(torch.promote_types(dtype, torch.float32))
    scales = copy_viewed_as(coded_TB[:, hidden:], torch.float32)
    return (codes * scales.repeat_interleave(TILE, 1)[:, :hidden]).to(dtype)


def copy_viewed_as(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of 2-D `rows` whose bytes are read as another dtype."""
    # A clone and not contiguous(), which does not copy a slice of at most one row: `view` with another dtype would
    # refuse its strides.
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)
