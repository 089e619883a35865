"""MXFP4, in which gpt-oss is published: numbers of 4 bits, 32 of which share a power of two (OCP MX 1.0)."""

import math

import torch
from torch import Tensor

BLOCK = 32
NAN = 255
BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode to fp32 (..., 32 G). bf16 can represent all of these values. NaN where the scale is NAN.

    Args:
        blocks: uint8 (..., G, 16), two numbers a byte, the first in its lower half.
        scales: uint8 (..., G), exponents of two plus 127.
    """
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    numbers = torch.ldexp(table[codes.int()], scales.int().unsqueeze(-1) - 127)
    return numbers.masked_fill_((scales == NAN).unsqueeze(-1), math.nan).flatten(-2)
