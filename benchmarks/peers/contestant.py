"""What a layer must offer to take part: it is built from given weights, makes a step, and returns its gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights, experts_of_rank
from runtime.commands.bench.dispatch.limits import Shape


@dataclass(frozen=True)
class Setting:
    """What a layer is built for: its sizes, its dtype and the ranks that share its experts."""

    shape: Shape
    dtype: torch.dtype
    ep_group: dist.ProcessGroup

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts."""
        return dist.get_world_size(self.ep_group)

    @property
    def ep_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self.ep_group)

    @property
    def expert_ids(self) -> range:
        """The experts that this rank must hold."""
        return experts_of_rank(self.shape, self.ep_size, self.ep_rank)


@dataclass(frozen=True)
class Contestant:
    """A layer in the race."""

    forward: Callable[[Tensor], Tensor]
    """(T, H) to (T, H)."""
    parameters: Sequence[nn.Parameter]
    read_grads: Callable[[], LayerWeights]
    """Gradients after a step: the router's from this rank's tokens, those of this rank's experts from all tokens."""

    def step(self, x_TH: Tensor, grad_output_TH: Tensor) -> Tensor:
        """Forward and backward; returns the output."""
        y_TH = self.forward(x_TH)
        y_TH.backward(grad_output_TH)
        return y_TH.detach()

    def reset(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None


Builder = Callable[[Setting, LayerWeights], Contestant]
"""Builds a layer from the fp32 weights of all experts, of which it takes this rank's. All ranks call it together."""


def parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter with a copy of `value`."""
    return nn.Parameter(value.to(dtype, copy=True))


def gradient(weight: Tensor) -> Tensor:
    """The gradient of a weight; zeros where it has none, since an expert without tokens is in no autograd graph."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def stacked_gradient(weights: Sequence[Tensor]) -> Tensor:
    """The gradients of one weight of each expert as one tensor."""
    return torch.stack([gradient(weight) for weight in weights])


def from_gate_up(router_EH: Tensor, gate_up_LFH: Tensor, down_LHF: Tensor) -> LayerWeights:
    """`LayerWeights` from one tensor of gate and up, (L, 2F, H), the gate first."""
    gate_LFH, up_LFH = gate_up_LFH.chunk(2, dim=1)
    return LayerWeights(router_EH, gate_LFH, up_LFH, down_LHF)
