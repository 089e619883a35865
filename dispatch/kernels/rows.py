"""Copies rows, and sums the copies of each row: the Triton form of `dispatch.exchange.row_map`.

Shapes: S sources (may be 0), A copies (may be 0), H width. order_A lists the copies of source 0, then of source 1, ...;
first_S says where in it those of each source begin. Both int32 or int64; a source may have no copy.
"""

import triton
import triton.language as tl
from torch import Tensor

from dispatch.kernels.tiles import acc_dtype, current_device, row_tile

COPIES_AT_ONCE = 8  # of one source, loaded together, so that a thread has several loads in flight


def sum_rows(copies_AH: Tensor, order_A: Tensor, first_S: Tensor) -> Tensor:
    """The sum of each source's copies, (S, H): in fp32 (fp64 for fp64), in fixed order, rounded once."""
    num_sources, (num_copies, width) = len(first_S), copies_AH.shape
    if not num_copies:
        return copies_AH.new_zeros(num_sources, width)
    sums_SH, block, num_warps = _prepare(copies_AH, num_sources)
    if num_sources:
        with current_device(copies_AH):
            _sum[num_sources, triton.cdiv(width, block)](
                copies_AH.contiguous(),
                order_A,
                first_S,
                sums_SH,
                num_sources,
                num_copies,
                width,
                block,
                COPIES_AT_ONCE,
                acc_dtype(copies_AH),
                num_warps=num_warps,
            )
    return sums_SH


def copy_rows(rows_SH: Tensor, order_A: Tensor, first_S: Tensor) -> Tensor:
    """The copies of all sources, (A, H). Reads a source once, where a gather reads it for each copy."""
    num_sources, width = rows_SH.shape
    copies_AH, block, num_warps = _prepare(rows_SH, len(order_A))
    if num_sources and len(order_A):
        with current_device(rows_SH):
            _copy[num_sources, triton.cdiv(width, block)](
                rows_SH.contiguous(),
                order_A,
                first_S,
                copies_AH,
                num_sources,
                len(order_A),
                width,
                block,
                num_warps=num_warps,
            )
    return copies_AH


def _prepare(rows: Tensor, num_rows: int) -> tuple[Tensor, int, int]:
    return rows.new_empty(num_rows, rows.shape[1]), *row_tile(rows.shape[1], rows.element_size())


@triton.jit(do_not_specialize=["num_sources", "num_copies"])
def _sum(
    copies,
    order,
    first,
    sums,
    num_sources,
    num_copies,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    source = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    start = tl.load(first + source)
    end = tl.load(first + source + 1, mask=source + 1 < num_sources, other=num_copies)
    total = tl.zeros([BLOCK], ACC_DTYPE)  # sums in fp32, whatever the dtype of the rows, and rounds once at the end
    # Not a for loop: Triton's interpreter takes no loop bounds that were loaded from memory.
    while start < end:
        index = start + tl.arange(0, AT_ONCE)
        copy = tl.load(order + index, mask=index < end, other=0).to(tl.int64)
        mask = (index < end)[:, None] & inside[None, :]
        tile = tl.load(copies + copy[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        total += tl.sum(tile.to(ACC_DTYPE), 0)
        start += AT_ONCE
    tl.store(sums + source * WIDTH + column, total.to(sums.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_sources", "num_copies"])
def _copy(rows, order, first, copies, num_sources, num_copies, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    source = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    index = tl.load(first + source)
    end = tl.load(first + source + 1, mask=source + 1 < num_sources, other=num_copies)
    row = tl.load(rows + source * WIDTH + column, mask=inside)
    while index < end:
        copy = tl.load(order + index).to(tl.int64)
        tl.store(copies + copy * WIDTH + column, row, mask=inside)
        index += 1
