"""SwiGLU times the combine weight of a row, in few passes, and its gradients.

Shapes: n rows (may be 0), F ffn_hidden, G = 2F, the gate first.
"""

from typing import Any

import torch
from torch import Tensor

from dispatch.recycler import Recycler


def weighted_swiglu(gate_up_nG: Tensor, weights_n: Tensor, *, out: Tensor) -> Tensor:
    """Write silu(gate) * up * weight into `out` (n, F). weights_n: in the dtype of the rows, else those are copied."""
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=1)
    torch.ops.aten.silu.out(gate_nF, out=out)
    return out.mul_(up_nF).mul_(weights_n.unsqueeze(1))


def weighted_swiglu_backward(
    gate_up_nG: Tensor,
    weights_n: Tensor,
    grad_inner_nF: Tensor,
    inner_nF: Tensor,
    grad_gate_up_nG: Tensor,
    grad_weights_n: Tensor,
    scratch_2nF: Tensor,
) -> None:
    """From the gradient P of inner, which it overwrites, those of gate and up and of the weights; and inner once more.

    With inner = silu(g) u w and s = sigmoid(g):  dL/dw = sum(P silu(g) u),  dL/du = P silu(g) w,
    dL/dg = P u w silu'(g),  silu'(g) = s + silu(g) (1 - s).
    """
    (gate, up), (grad_gate, grad_up) = gate_up_nG.chunk(2, dim=1), grad_gate_up_nG.chunk(2, dim=1)
    (sigmoid, silu), weights_n1 = scratch_2nF, weights_n.unsqueeze(1)
    torch.sigmoid(gate, out=sigmoid)
    torch.mul(gate, sigmoid, out=silu)
    weighted = torch.mul(up, weights_n1, out=grad_gate)
    torch.mul(silu, weighted, out=inner_nF)
    torch.lerp(sigmoid, sigmoid.new_ones(1, 1), silu, out=sigmoid)  # silu'(g)
    grad_gate.mul_(sigmoid).mul_(grad_inner_nF)
    # P silu(g): times w it is dL/du, times u and summed dL/dw.
    grad_inner_nF.mul_(silu)
    torch.mul(grad_inner_nF, weights_n1, out=grad_up)
    torch.sum(grad_inner_nF.mul_(up), 1, out=grad_weights_n, dtype=grad_weights_n.dtype)


class WeightedSwiGLU(torch.autograd.Function):
    """`weighted_swiglu` of all rows, (R, F), from gate_up_RG and weights_R. Keeps nothing but them for backward."""

    @staticmethod
    def forward(ctx: Any, gate_up_RG: Tensor, weights_R: Tensor, recycler: Recycler) -> Tensor:
        ctx.save_for_backward(gate_up_RG, weights_R)
        ctx.recycler = recycler
        inner_RF = recycler.empty(len(gate_up_RG), gate_up_RG.shape[1] // 2, like=gate_up_RG)
        return weighted_swiglu(gate_up_RG, weights_R.to(gate_up_RG.dtype), out=inner_RF)

    @staticmethod
    def backward(ctx: Any, grad_inner_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up_RG, weights_R = ctx.saved_tensors
        grad_gate_up_RG = ctx.recycler.empty(*gate_up_RG.shape, like=gate_up_RG)
        grad_weights_R = torch.empty_like(weights_R)
        # A gradient is autograd's to keep, so that it is copied before it is overwritten.
        scratch = ctx.recycler.empty(4, *grad_inner_RF.shape, like=grad_inner_RF)
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
