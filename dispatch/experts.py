"""The experts of one rank as one stacked SwiGLU: three tensors, not L modules.

Shapes: R rows (may be 0), H hidden, F ffn_hidden, L local experts, n rows of one expert (may be 0).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, rows_RH: Tensor, tokens_per_local_expert_L: Sequence[int], row_weights_R: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows_RH: in order of local expert; its dtype is the compute dtype.
            tokens_per_local_expert_L: rows of each expert, summing to R.
            row_weights_R: combine weight of each row, at least fp32.
        Returns:
            Weighted outputs, (R, H). An expert without rows gets zero gradients, not None.
        """
        self.meter.note_rows(max(tokens_per_local_expert_L, default=0))
        weights = (getattr(self, name).to(rows_RH.dtype) for name in EXPERT_WEIGHTS)
        with torch.autocast(rows_RH.device.type, enabled=False), self.meter.span("experts", rows_RH.device):
            if rows_RH.is_cuda and rows_RH.dtype == torch.bfloat16:
                return grouped_swiglu(rows_RH, tokens_per_local_expert_L, row_weights_R, *weights)
            counts_L = tuple(tokens_per_local_expert_L)
            out_RH: Tensor = _LoopedSwiGLU.apply(rows_RH, row_weights_R, *weights, counts_L, self.meter)
            return out_RH


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The expert weights of `model` by parameter name: the only parameters that differ between EP ranks."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(module, name)
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name in EXPERT_WEIGHTS
    }


def grouped_swiglu(
    rows_RH: Tensor,
    tokens_per_local_expert_L: Sequence[int],
    row_weights_R: Tensor,
    gate_LFH: Tensor,
    up_LFH: Tensor,
    down_LHF: Tensor,
) -> Tensor:
    """The experts by torch's grouped matmul: one kernel launch a projection, for CUDA. bf16; R may be 0."""
    ends_L = torch.tensor(tokens_per_local_expert_L, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends_L = ends_L.to(rows_RH.device, non_blocking=True)
    gate_RF = F.grouped_mm(rows_RH, gate_LFH.transpose(1, 2), offs=ends_L)
    up_RF = F.grouped_mm(rows_RH, up_LFH.transpose(1, 2), offs=ends_L)
    inner_RF = (F.silu(gate_RF) * up_RF * row_weights_R.unsqueeze(1)).to(rows_RH.dtype)
    return F.grouped_mm(inner_RF, down_LHF.transpose(1, 2), offs=ends_L)


class _LoopedSwiGLU(torch.autograd.Function):
    """The experts one after the other, for CPU and for dtypes without a grouped matmul.

    Each expert's elementwise work follows its matmul while its rows are in cache, results go straight into their slice
    of one output, and weight gradients into one stacked tensor: indexing w[e] under autograd would fill a full-size
    zero tensor for each expert. Only gate and up are kept for backward; the rest is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RH: Tensor,
        row_weights_R: Tensor,
        gate_LFH: Tensor,
        up_LFH: Tensor,
        down_LHF: Tensor,
        counts_L: tuple[int, ...],
        meter: Meter,
    ) -> Tensor:
        gate_RF = rows_RH.new_empty(len(rows_RH), gate_LFH.shape[1])
        up_RF = torch.empty_like(gate_RF)
        out_RH = torch.empty_like(rows_RH)
        for expert, rows in _slices(counts_L):
            gate, up = gate_RF[rows], up_RF[rows]
            torch.mm(rows_RH[rows], gate_LFH[expert].t(), out=gate)
            torch.mm(rows_RH[rows], up_LFH[expert].t(), out=up)
            inner = F.silu(gate).mul_(up).mul_(row_weights_R[rows, None])
            torch.mm(inner, down_LHF[expert].t(), out=out_RH[rows])
        ctx.save_for_backward(rows_RH, row_weights_R, gate_LFH, up_LFH, down_LHF, gate_RF, up_RF)
        ctx.counts_L, ctx.meter = counts_L, meter
        return out_RH

    @staticmethod
    def backward(ctx: Any, grad_out_RH: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.meter.span("experts", grad_out_RH.device):
            return *_swiglu_backward(grad_out_RH.contiguous(), ctx.counts_L, *ctx.saved_tensors), None, None


def _swiglu_backward(
    grad_out_RH: Tensor,
    counts_L: tuple[int, ...],
    rows_RH: Tensor,
    row_weights_R: Tensor,
    gate_LFH: Tensor,
    up_LFH: Tensor,
    down_LHF: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
) -> tuple[Tensor, ...]:
    grad_rows_RH = torch.empty_like(rows_RH)
    grad_weights_R = torch.empty_like(row_weights_R)
    grad_gate_LFH, grad_up_LFH, grad_down_LHF = (torch.zeros_like(w) for w in (gate_LFH, up_LFH, down_LHF))
    for expert, rows in _slices(counts_L):
        x, gate, up, weight = rows_RH[rows], gate_RF[rows], up_RF[rows], row_weights_R[rows, None]
        silu = F.silu(gate)
        inner = silu * up
        grad_inner = grad_out_RH[rows] @ down_LHF[expert]
        grad_weights_R[rows] = (grad_inner * inner).sum(1, dtype=row_weights_R.dtype)
        torch.mm(grad_out_RH[rows].t(), inner.mul_(weight), out=grad_down_LHF[expert])
        grad_up = silu.mul_(grad_inner.mul_(weight))
        grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
        torch.mm(grad_gate.t(), x, out=grad_gate_LFH[expert])
        torch.mm(grad_up.t(), x, out=grad_up_LFH[expert])
        torch.mm(grad_gate, gate_LFH[expert], out=grad_rows_RH[rows])
        grad_rows_RH[rows].addmm_(grad_up, up_LFH[expert])
    return grad_rows_RH, grad_weights_R, grad_gate_LFH, grad_up_LFH, grad_down_LHF


def _slices(counts_L: Sequence[int]) -> list[tuple[int, slice]]:
    """Expert and its rows, for the experts that have any."""
    found, start = [], 0
    for expert, count in enumerate(counts_L):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found
