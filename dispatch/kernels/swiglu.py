"""SwiGLU times the combine weight of a row, forward and backward, each in one pass over memory.

Shapes: R rows (may be 0), F ffn_hidden, G = 2F, the gate first. With inner = silu(g) u w and s = sigmoid(g):
dL/dw = sum(P silu(g) u),  dL/du = P silu(g) w,  dL/dg = P u w silu'(g),  silu'(g) = s + silu(g) (1 - s),
P being the gradient of inner. All in fp32 (fp64 for fp64), whatever the dtype of the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispatch.kernels.tiles import acc_dtype, current_device

NUM_WARPS = 4
TILE = 1024  # elements: with 4 warps, 16 bytes of bf16 a thread; wider dtypes take two or four accesses


def weighted_swiglu(gate_up_RG: Tensor, weights_R: Tensor) -> Tensor:
    """silu(gate) * up * weight, (R, F). weights_R: any float dtype. gate_up_RG must be contiguous."""
    num_rows, num_inner, rows, columns = _sizes(gate_up_RG)
    inner_RF = gate_up_RG.new_empty(num_rows, num_inner)
    if num_rows:
        with current_device(gate_up_RG):
            _forward[triton.cdiv(num_rows, rows), triton.cdiv(num_inner, columns)](
                gate_up_RG,
                weights_R.contiguous(),
                inner_RF,
                num_rows,
                num_inner,
                rows,
                columns,
                acc_dtype(gate_up_RG),
                num_warps=NUM_WARPS,
            )
    return inner_RF


def weighted_swiglu_backward_(gate_up_RG: Tensor, weights_R: Tensor, grad_inner_RF: Tensor) -> Tensor:
    """Overwrite gate_up_RG with its gradient, and grad_inner_RF with inner, which forward did not keep.

    Both must be contiguous.

    Returns:
        grad_weights_R: in fp32 (fp64 for fp64); a row is summed in a fixed order.
    """
    num_rows, num_inner, rows, columns = _sizes(gate_up_RG)
    grad_weights_R = weights_R.new_empty(num_rows, dtype=torch.promote_types(gate_up_RG.dtype, torch.float32))
    if num_rows:
        with current_device(gate_up_RG):
            _backward[(triton.cdiv(num_rows, rows),)](
                gate_up_RG,
                weights_R.contiguous(),
                grad_inner_RF,
                grad_weights_R,
                num_rows,
                num_inner,
                rows,
                columns,
                acc_dtype(gate_up_RG),
                num_warps=NUM_WARPS,
            )
    return grad_weights_R


def _sizes(gate_up_RG: Tensor) -> tuple[int, int, int, int]:
    """R, F, and the rows and columns of a tile. Where 64 divides F, so do the columns of a tile: no lane is idle."""
    num_rows, num_inner = len(gate_up_RG), gate_up_RG.shape[1] // 2
    power_of_two = num_inner & -num_inner  # the largest that divides F
    columns = min(256, triton.next_power_of_2(num_inner), max(64, power_of_two))
    return num_rows, num_inner, TILE // columns, columns


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    gate_up,
    weights,
    inner,
    num_rows,
    NUM_INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < NUM_INNER)[None, :]
    # Gate and up of a row lie NUM_INNER apart: two contiguous streams in, one out.
    gate_ptrs = gate_up + row[:, None] * (2 * NUM_INNER) + column[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(ACC_DTYPE)
    up = tl.load(gate_ptrs + NUM_INNER, mask=mask, other=0.0).to(ACC_DTYPE)
    weight = tl.load(weights + row, mask=row < num_rows, other=0.0).to(ACC_DTYPE)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(inner + row[:, None] * NUM_INNER + column[None, :], value.to(inner.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    gate_up,
    weights,
    grad_inner,
    grad_weights,
    num_rows,
    NUM_INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    # A program has whole rows, so that the sum for the weight stays in its registers: no atomics, a fixed order.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weights + row, mask=row < num_rows, other=0.0).to(ACC_DTYPE)[:, None]
    grad_weight = tl.zeros([ROWS, COLUMNS], ACC_DTYPE)
    for start in range(0, NUM_INNER, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < num_rows)[:, None] & (column < NUM_INNER)[None, :]
        gate_ptrs = gate_up + row[:, None] * (2 * NUM_INNER) + column[None, :]
        grad_ptrs = grad_inner + row[:, None] * NUM_INNER + column[None, :]
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(ACC_DTYPE)
        up = tl.load(gate_ptrs + NUM_INNER, mask=mask, other=0.0).to(ACC_DTYPE)
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(ACC_DTYPE)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_weight += grad * silu * up
        grad *= weight
        # Each element was read by the thread that now overwrites it.
        grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(gate_ptrs, grad_gate.to(gate_up.dtype.element_ty), mask=mask)
        tl.store(gate_ptrs + NUM_INNER, (grad * silu).to(gate_up.dtype.element_ty), mask=mask)
        tl.store(grad_ptrs, (silu * up * weight).to(grad_inner.dtype.element_ty), mask=mask)
    tl.store(grad_weights + row, tl.sum(grad_weight, 1), mask=row < num_rows)
