"""The experts of one rank all at once, by torch's grouped matmul: on CUDA, and on CPUs for small batches.

Shapes: Q arrived rows (may be 0), R expert rows, a copy of an arrived row for each of its experts (may be 0), H hidden,
F ffn_hidden, G = 2F, L local experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.dispatcher import DispatchHandle
from dispatch.experts.grouped_matmul import Groups, takes_grouped_mm
from dispatch.experts.looped import weighted_swiglu, weighted_swiglu_backward

# All rows of a small batch stay in a core's cache: 16 experts of 32 rows, 256 wide, take 6.8 ms forward and backward
# together and 8.6 one after the other (one thread); 64 experts of 128 rows, 512 wide, 177 and 152.
SMALL_BYTES = 2 * 2**20


def use_grouped(arrived_QH: Tensor, num_rows: int, ffn_hidden: int) -> bool:
    """Whether to use `grouped_swiglu`: on CUDA wherever torch can, on CPUs where copies of the rows stay in cache."""
    row_bytes = arrived_QH.shape[1] * arrived_QH.element_size()
    return takes_grouped_mm(arrived_QH, ffn_hidden) and (arrived_QH.is_cuda or num_rows * row_bytes <= SMALL_BYTES)


def grouped_swiglu(
    arrived_QH: Tensor, handle: DispatchHandle[Any], gate_up_LGH: Tensor, down_LHF: Tensor, *, buffer_pool: BufferPool
) -> Tensor:
    """down(silu(gate) * up * weight) of every expert on its rows, summed per arrived row: (Q, H).

    One grouped matmul for each projection computes all experts. bf16 or, on CPUs, fp32.
    """
    groups = Groups.from_counts(tuple(handle.tokens_per_local_expert_L), arrived_QH.device)
    rows_RH = handle.expert_rows.copy(arrived_QH)
    gate_up_RG = F.grouped_mm(rows_RH, gate_up_LGH.transpose(1, 2), offs=groups.ends_L)
    inner_RF = WeightedSwiGLU.apply(gate_up_RG, handle.row_weights_R, buffer_pool)
    return handle.expert_rows.sum(F.grouped_mm(inner_RF, down_LHF.transpose(1, 2), offs=groups.ends_L))


class WeightedSwiGLU(torch.autograd.Function):
    """`weighted_swiglu` of all rows, (R, F), from gate_up_RG and weights_R. Keeps nothing but them for backward."""

    @staticmethod
    def forward(ctx: Any, gate_up_RG: Tensor, weights_R: Tensor, buffer_pool: BufferPool) -> Tensor:
        ctx.save_for_backward(gate_up_RG, weights_R)
        ctx.buffer_pool = buffer_pool
        inner_RF = buffer_pool.empty(len(gate_up_RG), gate_up_RG.shape[1] // 2, like=gate_up_RG)
        return weighted_swiglu(gate_up_RG, weights_R.to(gate_up_RG.dtype), out=inner_RF)

    @staticmethod
    def backward(ctx: Any, grad_inner_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up_RG, weights_R = ctx.saved_tensors
        grad_gate_up_RG = ctx.buffer_pool.empty(*gate_up_RG.shape, like=gate_up_RG)
        grad_weights_R = torch.empty_like(weights_R)
        # Copied before it is overwritten: autograd may use a gradient elsewhere too.
        scratch = ctx.buffer_pool.empty(4, *grad_inner_RF.shape, like=grad_inner_RF)
        weighted_swiglu_backward(
            gate_up_RG,
            weights_R.to(gate_up_RG.dtype),
            scratch[0].copy_(grad_inner_RF),
            scratch[1],
            grad_gate_up_RG,
            grad_weights_R,
            scratch[2:],
        )
        return grad_gate_up_RG, grad_weights_R, None
