"""The experts of one rank as one stacked SwiGLU: three tensors, not L modules.

Shapes: Q arrived rows (may be 0), R expert rows, a copy for each of its experts (may be 0), H hidden, F ffn_hidden,
L local experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.dispatcher import DispatchHandle
from dispatch.meter import Meter

EXPERT_WEIGHTS = ("gate_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """`expert_ids` of a layer: down(silu(gate(x)) * up(x) * row weight) on the rows of each expert.

    gate_proj and up_proj are (L, F, H), down_proj is (L, H, F), row i belonging to expert_ids[i]. The combine weight is
    applied on the inner activation, which is the same sum and spares keeping the outputs for backward.
    """

    def __init__(self, hidden: int, ffn_hidden: int, expert_ids: range, meter: Meter) -> None:
        super().__init__()
        self.expert_ids, self.meter = expert_ids, meter
        num_local = len(expert_ids)
        self.gate_proj = nn.Parameter(torch.empty(num_local, ffn_hidden, hidden))
        self.up_proj = nn.Parameter(torch.empty(num_local, ffn_hidden, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden, ffn_hidden))
        if not self.gate_proj.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in; needed after `to_empty`."""
        for name in EXPERT_WEIGHTS:
            weight = getattr(self, name)
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, arrived_QH: Tensor, handle: DispatchHandle) -> Tensor:
        """Apply each expert to its rows.

        Args:
            arrived_QH: what `dispatch` returned with the handle; its dtype is the compute dtype.
        Returns:
            For each arrived row the sum of its experts' weighted outputs, (Q, H). An expert without rows gets zero
            gradients, not None.
        """
        counts_L = handle.tokens_per_local_expert_L
        self.meter.note_rows(max(counts_L, default=0))
        weights = [getattr(self, name).to(arrived_QH.dtype) for name in EXPERT_WEIGHTS]
        with torch.autocast(arrived_QH.device.type, enabled=False), self.meter.span("experts", arrived_QH.device):
            if arrived_QH.is_cuda and arrived_QH.dtype == torch.bfloat16:
                return grouped_swiglu(arrived_QH, handle, *weights)
            sources_R = handle.expert_rows.source_of_copy_A
            sums_QH: Tensor = _LoopedSwiGLU.apply(
                arrived_QH, handle.row_weights_R, *weights, sources_R, tuple(counts_L), self.meter
            )
            return sums_QH


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The expert weights of `model` by parameter name: the only parameters that differ between EP ranks."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(module, name)
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name in EXPERT_WEIGHTS
    }


def grouped_swiglu(
    arrived_QH: Tensor, handle: DispatchHandle, gate_LFH: Tensor, up_LFH: Tensor, down_LHF: Tensor
) -> Tensor:
    """The experts by torch's grouped matmul: one kernel launch a projection, for CUDA. bf16; Q and R may be 0."""
    ends_L = torch.tensor(handle.tokens_per_local_expert_L, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends_L = ends_L.to(arrived_QH.device, non_blocking=True)
    rows_RH = handle.expert_rows.copy(arrived_QH)
    gate_RF = F.grouped_mm(rows_RH, gate_LFH.transpose(1, 2), offs=ends_L)
    up_RF = F.grouped_mm(rows_RH, up_LFH.transpose(1, 2), offs=ends_L)
    inner_RF = (F.silu(gate_RF) * up_RF * handle.row_weights_R.unsqueeze(1)).to(rows_RH.dtype)
    return handle.expert_rows.sum(F.grouped_mm(inner_RF, down_LHF.transpose(1, 2), offs=ends_L))


class _LoopedSwiGLU(torch.autograd.Function):
    """The experts one after the other, for CPU and for dtypes without a grouped matmul.

    An expert gathers its rows from those that arrived and adds its outputs to their sums, so that no tensor holds a row
    once per expert; in backward the same. Its elementwise work follows its matmul while its rows are in cache, and
    weight gradients go straight into one stacked tensor: indexing w[e] under autograd would fill a tensor of zeros for
    each expert. Of the inner activations only gate and up are kept; the rest is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        arrived_QH: Tensor,
        row_weights_R: Tensor,
        gate_LFH: Tensor,
        up_LFH: Tensor,
        down_LHF: Tensor,
        sources_R: Tensor,
        counts_L: tuple[int, ...],
        meter: Meter,
    ) -> Tensor:
        gate_RF = arrived_QH.new_empty(len(sources_R), gate_LFH.shape[1])
        up_RF = torch.empty_like(gate_RF)
        sums_QH = _zero_sums(arrived_QH)
        for expert, rows in _slices(counts_L):
            x, gate, up = arrived_QH.index_select(0, sources_R[rows]), gate_RF[rows], up_RF[rows]
            torch.mm(x, gate_LFH[expert].t(), out=gate)
            torch.mm(x, up_LFH[expert].t(), out=up)
            inner = F.silu(gate).mul_(up).mul_(row_weights_R[rows, None])
            # A token chooses an expert once, so no two rows of one call add to the same sum: the order is fixed.
            sums_QH.index_add_(0, sources_R[rows], (inner @ down_LHF[expert].t()).to(sums_QH.dtype))
        ctx.save_for_backward(arrived_QH, row_weights_R, gate_LFH, up_LFH, down_LHF, sources_R, gate_RF, up_RF)
        ctx.counts_L, ctx.meter = counts_L, meter
        return sums_QH.to(arrived_QH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.meter.span("experts", grad_sums_QH.device):
            return *_swiglu_backward(grad_sums_QH, ctx.counts_L, *ctx.saved_tensors), None, None, None


def _swiglu_backward(
    grad_sums_QH: Tensor,
    counts_L: tuple[int, ...],
    arrived_QH: Tensor,
    row_weights_R: Tensor,
    gate_LFH: Tensor,
    up_LFH: Tensor,
    down_LHF: Tensor,
    sources_R: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
) -> tuple[Tensor, ...]:
    grad_arrived_QH = _zero_sums(arrived_QH)
    grad_weights_R = torch.empty_like(row_weights_R)
    grad_gate_LFH, grad_up_LFH, grad_down_LHF = (torch.zeros_like(w) for w in (gate_LFH, up_LFH, down_LHF))
    for expert, rows in _slices(counts_L):
        sources, gate, up, weight = sources_R[rows], gate_RF[rows], up_RF[rows], row_weights_R[rows, None]
        x, grad_out = arrived_QH.index_select(0, sources), grad_sums_QH.index_select(0, sources)
        silu = F.silu(gate)
        inner = silu * up
        grad_inner = grad_out @ down_LHF[expert]
        grad_weights_R[rows] = (grad_inner * inner).sum(1, dtype=row_weights_R.dtype)
        torch.mm(grad_out.t(), inner.mul_(weight), out=grad_down_LHF[expert])
        grad_up = silu.mul_(grad_inner.mul_(weight))
        grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
        torch.mm(grad_gate.t(), x, out=grad_gate_LFH[expert])
        torch.mm(grad_up.t(), x, out=grad_up_LFH[expert])
        grad_x = torch.mm(grad_gate, gate_LFH[expert], out=x).addmm_(grad_up, up_LFH[expert])
        grad_arrived_QH.index_add_(0, sources, grad_x.to(grad_arrived_QH.dtype))
    return grad_arrived_QH.to(arrived_QH.dtype), grad_weights_R, grad_gate_LFH, grad_up_LFH, grad_down_LHF


def _zero_sums(rows: Tensor) -> Tensor:
    # bf16 rows are summed in fp32: eight roundings in a row would cost three bits.
    return torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))


def _slices(counts_L: Sequence[int]) -> list[tuple[int, slice]]:
    """Expert and its rows, for the experts that have any."""
    found, start = [], 0
    for expert, count in enumerate(counts_L):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found
