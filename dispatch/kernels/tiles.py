"""What every launch needs: tiles of 16 bytes a thread, the dtype of sums, the tensor's device as the current one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP = 32
ACCESS_BYTES = 16


def wide_dtype(tensor: Tensor) -> tl.dtype:
    """The dtype to compute in: fp64 for fp64, else fp32."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def row_tile(width: int, element_bytes: int) -> tuple[int, int]:
    """Columns of one row, a power of two, and warps: an access a thread, at most four warps.

    A thread then holds the same columns of every row that it adds up, and no two threads have to add theirs.
    """
    columns_of_warp = WARP * ACCESS_BYTES // element_bytes
    num_warps = min(4, max(1, triton.next_power_of_2(width) // columns_of_warp))
    return columns_of_warp * num_warps, num_warps


@contextmanager
def current_device(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device, whatever the device of its arguments."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield
