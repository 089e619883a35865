"""The experts of one rank as one stacked SwiGLU: two tensors, not L modules.

Shapes: Q arrived rows (may be 0), R expert rows, a copy of an arrived row for each of its experts (may be 0), H hidden,
F ffn_hidden, G = 2F, L local experts, followed by the copies of other ranks' experts if this rank has any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.dispatcher import DispatchHandle
from dispatch.experts.fused import fused_swiglu
from dispatch.experts.grouped import grouped_swiglu, use_grouped
from dispatch.experts.joined_rows import JoinedParameters
from dispatch.experts.looped import LoopedSwiGLU
from dispatch.experts.weight_grads import ExpertWeights, WeightGrads
from dispatch.kernels.availability import use_triton

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")

Compute = Callable[[Tensor, DispatchHandle[Any]], Tensor]  # (arrived_QH, handle) -> sums_QH, which combine sends back
LayerCall = Callable[[Tensor, Tensor, Compute], Tensor]  # (x_TH, topk_weights_TK, compute) -> y_TH: the exchanges too


class Experts(JoinedParameters):
    """The experts `expert_ids` of a layer: down(silu(gate(x)) * up(x) * combine weight) on the rows of each.

    gate_up_proj is (L, 2F, H), the gate first, down_proj is (L, H, F); entry i is of expert_ids[i]. The combine weight
    multiplies the inner activation: down is linear, so the result is the same, and backward needs no expert outputs.
    """

    def __init__(self, hidden: int, ffn_hidden: int, expert_ids: range, meter: Meter, buffer_pool: BufferPool) -> None:
        super().__init__()
        self.expert_ids, self.meter, self.buffer_pool = expert_ids, meter, buffer_pool
        self.gate_up_proj = nn.Parameter(torch.empty(len(expert_ids), 2 * ffn_hidden, hidden))
        self.down_proj = nn.Parameter(torch.empty(len(expert_ids), hidden, ffn_hidden))
        if not self.gate_up_proj.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in; needed after `to_empty`."""
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x_TH: Tensor, topk_weights_TK: Tensor, layer_call: LayerCall) -> Tensor:
        """Call the layer, with its exchanges, inside this module: FSDP gathers weights once for all chunks of it."""
        return layer_call(x_TH, topk_weights_TK, partial(self.compute, weights=self.weights(x_TH.dtype)))

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """The weights in `dtype`, cast once for all chunks of one layer call, which share them."""
        grads = WeightGrads(self.buffer_pool)
        return ExpertWeights(*grads.share(*self.stacks(dtype)), grads)

    def stacks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weights that rows are multiplied with, in `dtype`: (L, G, H) and (L, H, F)."""
        return self.rows("gate_up_proj").to(dtype), self.rows("down_proj").to(dtype)

    def compute(self, arrived_QH: Tensor, handle: DispatchHandle[Any], weights: ExpertWeights | None = None) -> Tensor:
        """Apply each expert to its rows.

        Args:
            arrived_QH: what `dispatch` returned with the handle; its dtype is the compute dtype.
            weights: those that all chunks of a layer call share; None makes them for this call.
        Returns:
            For each arrived row the sum of its experts' weighted outputs, (Q, H). An expert without rows gets zero
            gradients, not None.
        """
        weights = weights or self.weights(arrived_QH.dtype)
        gate_up_LGH, down_LHF, grads = weights.gate_up_LGH, weights.down_LHF, weights.grads
        counts_L = tuple(handle.tokens_per_local_expert_L)
        # Rows and weights have the compute dtype already.
        with torch.autocast(arrived_QH.device.type, enabled=False), self.meter.span("experts", arrived_QH.device):
            if use_triton(arrived_QH):
                return fused_swiglu(arrived_QH, handle, gate_up_LGH, down_LHF, self.meter)
            if use_grouped(arrived_QH, len(handle.sources_R), self.down_proj.shape[2]):
                return grouped_swiglu(arrived_QH, handle, gate_up_LGH, down_LHF, buffer_pool=self.buffer_pool)
            sums_QH: Tensor = LoopedSwiGLU.apply(
                arrived_QH, handle.row_weights_R, gate_up_LGH, down_LHF, handle.sources_R, counts_L, grads, self.meter
            )
            return sums_QH


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The expert weights of `model` by parameter name: the only parameters that differ between EP ranks.

    The gradient of every other parameter must be summed over all ranks, that of an expert only over its replicas.
    """
    experts = {prefix: module for prefix, module in model.named_modules() if isinstance(module, Experts)}
    return {name: each for prefix in experts for name, each in experts[prefix].named_parameters(prefix, recurse=False)}
