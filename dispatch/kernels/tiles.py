"""What every kernel launch needs: tiles of 16 bytes for each thread, the dtype of sums, the current device."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP = 32
ACCESS_BYTES = 16


def acc_dtype(tensor: Tensor) -> tl.dtype:
    """The dtype to compute and sum in: fp64 for fp64, else fp32."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def row_tile(width: int, element_bytes: int) -> tuple[int, int]:
    """The columns of a row that one program computes, a power of two, and its warps, 1 to 4. A thread has one access.

    A thread then has the same columns of every row that it adds up, and threads need not exchange partial sums.
    """
    columns_of_warp = WARP * ACCESS_BYTES // element_bytes
    num_warps = min(4, max(1, triton.next_power_of_2(width) // columns_of_warp))
    return columns_of_warp * num_warps, num_warps


def current_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's CUDA device the current one, on which Triton launches whatever the device of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
