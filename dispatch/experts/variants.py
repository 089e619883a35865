"""Experts with biases or with the clamped SwiGLU of gpt-oss, on every device and in every dtype.

The kernels of plain SwiGLU can do neither. These experts use grouped matmuls, or a loop where torch has none, and
torch's elementwise operators.

Shapes: Q arrived rows (may be 0), R expert rows, a copy of an arrived row for each of its experts (may be 0), H hidden,
F ffn_hidden, G = 2F (the gate first), L local experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dispatch.config import MoEConfig
from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.dispatcher import DispatchHandle
from dispatch.exchange.row_map import RowMap
from dispatch.experts.grouped_matmul import Groups
from dispatch.experts.stacked import Experts
from dispatch.experts.weight_grads import ExpertWeights


def make_experts(hidden: int, config: MoEConfig, expert_ids: range, meter: Meter, buffer_pool: BufferPool) -> Experts:
    """The experts `expert_ids` of a layer, of the kind that the settings ask for."""
    if config.has_plain_experts:
        return Experts(hidden, config.ffn_hidden, expert_ids, meter, buffer_pool)
    return VariantExperts(hidden, config, expert_ids, meter, buffer_pool)


@dataclass(frozen=True)
class _VariantWeights(ExpertWeights):
    """The weights with their biases, which are None where the config has none."""

    gate_up_bias_LG: Tensor | None
    down_bias_LH: Tensor | None


class VariantExperts(Experts):
    """down(act(gate_up(x))) times the row weight, where projections may have biases and `act` may be clamped.

    gate_up_proj_bias is (L, 2F), the gate first, down_proj_bias (L, H).
    """

    def __init__(
        self, hidden: int, config: MoEConfig, expert_ids: range, meter: Meter, buffer_pool: BufferPool
    ) -> None:
        super().__init__(hidden, config.ffn_hidden, expert_ids, meter, buffer_pool)
        self.config = config
        self.gate_up_proj_bias = self.down_proj_bias = None
        if config.expert_biases:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(len(expert_ids), 2 * config.ffn_hidden))
            self.down_proj_bias = nn.Parameter(torch.zeros(len(expert_ids), hidden))

    def reset_parameters(self) -> None:
        """See `Experts.reset_parameters`; biases begin at 0."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """See `Experts.weights`; here with the biases."""
        plain, names = super().weights(dtype), ("gate_up_proj_bias", "down_proj_bias")
        cast = [None if getattr(self, name) is None else self.rows(name).to(dtype) for name in names]
        return _VariantWeights(plain.gate_up_LGH, plain.down_LHF, plain.grads, *cast)

    def compute(self, arrived_QH: Tensor, handle: DispatchHandle[Any], weights: ExpertWeights | None = None) -> Tensor:
        """See `Experts.compute`."""
        weights = weights or self.weights(arrived_QH.dtype)
        if not isinstance(weights, _VariantWeights):
            raise TypeError(f"weights are {type(weights).__name__}; they must be those of `VariantExperts.weights`")
        groups = Groups.from_counts(tuple(handle.tokens_per_local_expert_L), arrived_QH.device)
        with torch.autocast(arrived_QH.device.type, enabled=False), self.meter.span("experts", arrived_QH.device):
            sums_QH: Tensor = _VariantSwiGLU.apply(
                arrived_QH,
                handle.row_weights_R,
                weights.gate_up_LGH,
                weights.down_LHF,
                weights.gate_up_bias_LG,
                weights.down_bias_LH,
                handle.expert_rows,
                groups,
                Activation.from_config(self.config),
                self.meter,
            )
            return sums_QH


@dataclass(frozen=True)
class Activation:
    """(up + offset) * gate * sigmoid(slope * gate), with gate clamped to (-inf, limit] and up to [-limit, limit].

    SwiGLU has no limit, slope 1 and offset 0; gpt-oss (arXiv 2508.10925, section 2.2) 7, 1.702 and 1.
    """

    limit: float
    slope: float
    offset: float

    @classmethod
    def from_config(cls, config: MoEConfig) -> "Activation":
        """The activation that the settings ask for."""
        if not config.swiglu_limit:
            return cls(math.inf, 1.0, 0.0)
        return cls(config.swiglu_limit, config.swiglu_alpha, 1.0)

    def forward(self, gate_up_RG: Tensor) -> Tensor:
        """The inner activation, (R, F)."""
        gate_RF, up_RF = self._clamped(gate_up_RG)
        return torch.sigmoid(gate_RF * self.slope).mul_(gate_RF).mul_(up_RF + self.offset)

    def backward(self, gate_up_RG: Tensor, grad_inner_RF: Tensor) -> Tensor:
        """The gradient of gate and up, (R, G); zero beyond the limit."""
        # torch's derivatives of sigmoid and clamp, written out: autograd would keep every intermediate tensor.
        gate_RF, up_RF = self._clamped(gate_up_RG)
        sigmoid_RF = torch.sigmoid(gate_RF * self.slope)
        glu_RF = gate_RF * sigmoid_RF
        grad_gate_RF = (sigmoid_RF + self.slope * glu_RF * (1 - sigmoid_RF)) * (up_RF + self.offset) * grad_inner_RF
        grad_gate_up_RG = torch.cat([grad_gate_RF, glu_RF * grad_inner_RF], dim=1)
        return grad_gate_up_RG.mul_(gate_up_RG == torch.cat([gate_RF, up_RF], dim=1))

    def _clamped(self, gate_up_RG: Tensor) -> tuple[Tensor, Tensor]:
        gate_RF, up_RF = gate_up_RG.chunk(2, dim=1)
        return gate_RF.clamp(max=self.limit), up_RF.clamp(-self.limit, self.limit)


class _VariantSwiGLU(torch.autograd.Function):
    """The sum of each arrived row's weighted expert outputs, (Q, H).

    Keeps gate and up, as they are before the activation, for backward, which computes the rest again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        arrived_QH: Tensor,
        row_weights_R: Tensor,
        gate_up_LGH: Tensor,
        down_LHF: Tensor,
        gate_up_bias_LG: Tensor | None,
        down_bias_LH: Tensor | None,
        rows: RowMap,
        groups: Groups,
        activation: Activation,
        meter: Meter,
    ) -> Tensor:
        weights_R1 = row_weights_R.to(arrived_QH.dtype).unsqueeze(1)
        gate_up_RG = groups.mm(rows.copy_no_grad(arrived_QH), gate_up_LGH.transpose(1, 2))
        _add_bias(gate_up_RG, gate_up_bias_LG, groups)
        out_RH = groups.mm(activation.forward(gate_up_RG), down_LHF.transpose(1, 2))
        _add_bias(out_RH, down_bias_LH, groups)
        ctx.save_for_backward(arrived_QH, row_weights_R, gate_up_LGH, down_LHF, down_bias_LH, gate_up_RG)
        ctx.rows, ctx.groups, ctx.activation, ctx.meter = rows, groups, activation, meter
        return rows.sum_no_grad(out_RH.mul_(weights_R1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.meter.span("experts", grad_sums_QH.device):
            return *_backward(ctx, grad_sums_QH), *[None] * 4


def _backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of arrived rows, row weights, the two stacks of expert weights and their biases."""
    arrived_QH, row_weights_R, gate_up_LGH, down_LHF, down_bias_LH, gate_up_RG = ctx.saved_tensors
    # needs_grad: an entry for each argument of forward: 0 arrived rows, 2 gate and up, 3 down, 4 and 5 their biases.
    rows, groups, needs_grad = ctx.rows, ctx.groups, ctx.needs_input_grad
    weights_R1 = row_weights_R.to(arrived_QH.dtype).unsqueeze(1)
    inner_RF, grad_out_RH = ctx.activation.forward(gate_up_RG), rows.copy_no_grad(grad_sums_QH)
    # The row weight multiplies an output, so its gradient is output . grad_out. As output = down(inner) + bias, that is
    # inner . down^T(grad_out) + bias . grad_out, and no output has to be computed again.
    grad_inner_RF = groups.mm(grad_out_RH, down_LHF)
    grad_weights_R = (grad_inner_RF * inner_RF).sum(1, dtype=row_weights_R.dtype)
    if down_bias_LH is not None:
        for expert, run in groups.runs:
            grad_weights_R[run] += (grad_out_RH[run] @ down_bias_LH[expert]).to(grad_weights_R.dtype)
    grad_out_RH.mul_(weights_R1)
    grad_down_LHF = groups.outer(grad_out_RH, inner_RF) if needs_grad[3] else None
    grad_down_bias_LH = _sum_by_expert(grad_out_RH, groups) if needs_grad[5] else None
    grad_gate_up_RG = ctx.activation.backward(gate_up_RG, grad_inner_RF.mul_(weights_R1))
    grad_gate_up_LGH = groups.outer(grad_gate_up_RG, rows.copy_no_grad(arrived_QH)) if needs_grad[2] else None
    grad_gate_up_bias_LG = _sum_by_expert(grad_gate_up_RG, groups) if needs_grad[4] else None
    grad_arrived_QH = rows.sum_no_grad(groups.mm(grad_gate_up_RG, gate_up_LGH)) if needs_grad[0] else None
    return grad_arrived_QH, grad_weights_R, grad_gate_up_LGH, grad_down_LHF, grad_gate_up_bias_LG, grad_down_bias_LH


def _add_bias(rows_RA: Tensor, bias_LA: Tensor | None, groups: Groups) -> None:
    if bias_LA is not None:
        for expert, run in groups.runs:
            rows_RA[run] += bias_LA[expert]


def _sum_by_expert(rows_RA: Tensor, groups: Groups) -> Tensor:
    """The sum of each expert's rows, (L, A); zero for an expert without rows."""
    sums_LA = rows_RA.new_zeros(len(groups.counts_L), rows_RA.shape[1])
    for expert, run in groups.runs:
        torch.sum(rows_RA[run], 0, out=sums_LA[expert])
    return sums_LA
