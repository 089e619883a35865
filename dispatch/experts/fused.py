"""The experts of one rank on CUDA: grouped matmuls with few kernels around them, as one node of the autograd graph.

Shapes: Q arrived rows (may be 0), R expert rows, a copy of an arrived row for each of its experts (may be 0), H hidden,
F ffn_hidden, G = 2F, L local experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dispatch.diagnosis.meter import Meter
from dispatch.exchange.dispatcher import DispatchHandle
from dispatch.exchange.row_map import RowMap
from dispatch.experts.grouped_matmul import Groups, takes_grouped_mm

# Where torch has no grouped matmul, one kernel computes up to this many rows, such as those of a short prompt; it
# reads a matrix for each row. For more rows there is a matmul for each expert, which reads each matrix once.
FEW_ROWS = 64


def fused_swiglu(
    arrived_QH: Tensor, handle: DispatchHandle[Any], gate_up_LGH: Tensor, down_LHF: Tensor, meter: Meter
) -> Tensor:
    """down(silu(gate) * up * weight) of every expert on its rows, summed per arrived row: (Q, H).

    Rows and weights must have one dtype. It needs Triton (`use_triton`), and the host does not wait for the device.
    """
    groups = Groups.from_counts(tuple(handle.tokens_per_local_expert_L), arrived_QH.device)
    rows = handle.expert_rows
    sums_QH: Tensor = FusedSwiGLU.apply(
        arrived_QH,
        handle.row_weights_R,
        gate_up_LGH,
        down_LHF,
        rows.source_of_copy_A,
        rows.copies_by_source_A,
        rows.first_S,
        groups.ends_L,
        groups.counts_L,
        meter,
    )
    return sums_QH


# The tensors of RowMap and Groups are arguments of their own, to be saved with `save_for_backward`: activation
# recompute drops saved tensors, but would keep attributes of ctx.


class FusedSwiGLU(torch.autograd.Function):
    """What `fused_swiglu` computes. Keeps only gate and up, before the activation; backward recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        arrived_QH: Tensor,
        row_weights_R: Tensor,
        gate_up_LGH: Tensor,
        down_LHF: Tensor,
        source_of_copy_R: Tensor,
        copies_by_source_R: Tensor,
        first_Q: Tensor,
        ends_L: Tensor,
        counts_L: tuple[int, ...],
        meter: Meter,
    ) -> Tensor:
        from dispatch.kernels.swiglu import weighted_swiglu

        rows, groups = RowMap(source_of_copy_R, copies_by_source_R, first_Q), Groups(counts_L, ends_L)
        gate_up_RG = _linear(arrived_QH, gate_up_LGH, groups, rows)
        ctx.save_for_backward(
            arrived_QH,
            row_weights_R,
            gate_up_LGH,
            down_LHF,
            source_of_copy_R,
            copies_by_source_R,
            first_Q,
            ends_L,
            gate_up_RG,
        )
        ctx.counts_L, ctx.meter, ctx.has_overwritten = counts_L, meter, False
        return rows.sum_no_grad(_linear(weighted_swiglu(gate_up_RG, row_weights_R), down_LHF, groups))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.meter.span("experts", grad_sums_QH.device):
            return *_backward(ctx, grad_sums_QH), *[None] * 6


def _backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of arrived rows, row weights, and the two stacks of expert weights, where autograd needs them."""
    from dispatch.kernels.swiglu import weighted_swiglu_backward_

    # An entry for each argument of forward: 0 arrived rows, 2 gate and up, 3 down.
    needs_grad = ctx.needs_input_grad
    arrived_QH, row_weights_R, gate_up_LGH, down_LHF, *maps, ends_L, gate_up_RG = ctx.saved_tensors
    rows, groups = RowMap(*maps), Groups(ctx.counts_L, ends_L)
    if ctx.has_overwritten:  # a second backward through a graph that was retained
        gate_up_RG = _linear(arrived_QH, gate_up_LGH, groups, rows)
    grad_out_RH = rows.copy_no_grad(grad_sums_QH)
    inner_RF = groups.mm(grad_out_RH, down_LHF)
    # In place, which saves 3F elements a row: the gradient of inner is overwritten with inner, gate and up with theirs.
    ctx.has_overwritten = True
    grad_row_weights_R = weighted_swiglu_backward_(gate_up_RG, row_weights_R, inner_RF)
    grad_down_LHF = groups.outer(grad_out_RH, inner_RF) if needs_grad[3] else None
    del grad_out_RH, inner_RF  # before rows of the same size are made below
    grad_gate_up_LGH = groups.outer(gate_up_RG, rows.copy_no_grad(arrived_QH)) if needs_grad[2] else None
    grad_arrived_QH = rows.sum_no_grad(groups.mm(gate_up_RG, gate_up_LGH)) if needs_grad[0] else None
    return grad_arrived_QH, grad_row_weights_R.to(row_weights_R.dtype), grad_gate_up_LGH, grad_down_LHF


def _linear(rows: Tensor, weights_LBA: Tensor, groups: Groups, row_map: RowMap | None = None) -> Tensor:
    """Each expert row times the transposed matrix of its expert, (R, B).

    rows: the expert rows, (R, A); with row_map the arrived rows that they are copies of, (Q, A).
    """
    sources_R = None if row_map is None else row_map.source_of_copy_A
    num_rows = len(rows) if sources_R is None else len(sources_R)
    if num_rows <= FEW_ROWS and not takes_grouped_mm(rows, weights_LBA.shape[1]):
        from dispatch.kernels.few_rows import few_rows_mm

        return few_rows_mm(rows, sources_R, groups.ends_L, weights_LBA)
    return groups.mm(rows if row_map is None else row_map.copy_no_grad(rows), weights_LBA.transpose(1, 2))
