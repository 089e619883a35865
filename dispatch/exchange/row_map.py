"""Copies of rows inside one rank, and sums of such copies; each is the exact backward of the other.

Shapes: S sources (tokens, or rows that arrived; may be 0), A copies (may be 0), H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dispatch.kernels.availability import use_triton

RowFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowMap:
    """Which source each row is a copy of, and which rows are the copies of each source.

    source_of_copy_A: the source of each copy. copies_by_source_A: all copies, those of source 0 first, then those of
    source 1, and so on. first_S: where in copies_by_source_A the copies of each source begin. All int64. A source may
    have no copy.
    """

    source_of_copy_A: Tensor
    copies_by_source_A: Tensor
    first_S: Tensor

    @classmethod
    def from_sources(cls, source_of_copy_A: Tensor, num_sources: int) -> "RowMap":
        """From source_of_copy_A alone; the copies of a source are summed in the order in which they lie."""
        counts_S = torch.zeros(num_sources, dtype=torch.int64, device=source_of_copy_A.device)
        counts_S.scatter_add_(0, source_of_copy_A, torch.ones_like(source_of_copy_A))
        return cls(source_of_copy_A, source_of_copy_A.argsort(stable=True), counts_S.cumsum(0) - counts_S)

    def copy(self, rows_SH: Tensor) -> Tensor:
        """One row a copy, (A, H)."""
        copies_AH: Tensor = _Linear.apply(rows_SH, self.copy_no_grad, self.sum_no_grad)
        return copies_AH

    def sum(self, copies_AH: Tensor) -> Tensor:
        """The sum of each source's copies, (S, H), in fixed order; zero for a source without one."""
        sums_SH: Tensor = _Linear.apply(copies_AH, self.sum_no_grad, self.copy_no_grad)
        return sums_SH

    def copy_no_grad(self, rows_SH: Tensor) -> Tensor:
        """As `copy`, but autograd does not see it: for use inside an autograd function."""
        if use_triton(rows_SH):
            from dispatch.kernels.rows import copy_rows

            return copy_rows(rows_SH, self.copies_by_source_A, self.first_S)
        return rows_SH.index_select(0, self.source_of_copy_A)

    def sum_no_grad(self, copies_AH: Tensor) -> Tensor:
        """As `sum`, but autograd does not see it: for use inside an autograd function."""
        if use_triton(copies_AH):
            from dispatch.kernels.rows import sum_rows

            return sum_rows(copies_AH, self.copies_by_source_A, self.first_S)
        if not len(copies_AH):
            return copies_AH.new_zeros((len(self.first_S), copies_AH.shape[1]))
        # One pass: on CPU 3 to 10 times faster than gather and sum, or index_add; and bf16 is accumulated in fp32.
        return F.embedding_bag(self.copies_by_source_A, copies_AH, self.first_S, mode="sum")


class _Linear(torch.autograd.Function):
    """A linear function of rows, and its transpose for the gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, function: RowFunction, transpose: RowFunction) -> Tensor:
        ctx.transpose = transpose
        return function(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grad), None, None
