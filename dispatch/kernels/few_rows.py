"""Multiplies a few rows with the matrices of their experts in one launch, not in one launch for each expert.

Shapes: R rows, Q rows that they are copies of, L experts, N outputs, K inner width.
"""

import triton
import triton.language as tl
from torch import Tensor

from dispatch.kernels.tiles import acc_dtype, current_device

COLUMNS = 128  # of K at once
OUTPUTS = 16  # of N in one program: a tile of 16 bytes or more a thread, for bf16 as for fp64
NUM_WARPS = 4


def few_rows_mm(rows_QK: Tensor, sources_R: Tensor | None, ends_L: Tensor, weights_LNK: Tensor) -> Tensor:
    """Row sources_R[r] of rows_QK times the transposed matrix of the expert of r, (R, N).

    sources_R: None if R = Q and row r is row r of rows_QK. ends_L: rows are in order of expert, those of expert e end
    before ends_L[e]. A matrix is read once for each row of its expert, often from the cache: fast only for few rows.
    """
    num_rows = len(rows_QK) if sources_R is None else len(sources_R)
    num_experts, num_outputs, width = weights_LNK.shape
    out_RN = rows_QK.new_empty(num_rows, num_outputs)
    if num_rows:
        with current_device(rows_QK):
            _mm[num_rows, triton.cdiv(num_outputs, OUTPUTS)](
                rows_QK.contiguous(),
                ends_L if sources_R is None else sources_R,
                ends_L,
                weights_LNK.contiguous(),
                out_RN,
                sources_R is not None,
                num_outputs,
                width,
                num_experts,
                triton.next_power_of_2(num_experts),
                OUTPUTS,
                COLUMNS,
                acc_dtype(rows_QK),
                num_warps=NUM_WARPS,
            )
    return out_RN


@triton.jit
def _mm(
    rows,
    sources,
    ends,
    weights,
    out,
    HAS_SOURCES: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    source = tl.load(sources + row).to(tl.int64) if HAS_SOURCES else row
    expert_id = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert_id, mask=expert_id < NUM_EXPERTS, other=0)
    # The row's expert is the number of experts whose rows end at or before it.
    expert = tl.sum(((end <= row) & (expert_id < NUM_EXPERTS)).to(tl.int64), 0)
    matrix = weights + (expert * NUM_OUTPUTS + output)[:, None] * WIDTH
    total = tl.zeros([OUTPUTS, COLUMNS], ACC_DTYPE)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < WIDTH
        mask = (output < NUM_OUTPUTS)[:, None] & inside[None, :]
        x = tl.load(rows + source * WIDTH + column, mask=inside, other=0.0).to(ACC_DTYPE)
        total += tl.load(matrix + column[None, :], mask=mask, other=0.0).to(ACC_DTYPE) * x[None, :]
    value = tl.sum(total, 1).to(out.dtype.element_ty)
    tl.store(out + row * NUM_OUTPUTS + output, value, mask=output < NUM_OUTPUTS)
