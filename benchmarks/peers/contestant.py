"""What a layer must be to take part: built from given weights, stepped, asked for its gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights, experts_of_rank
from runtime.commands.bench.dispatch.limits import Shape


@dataclass(frozen=True)
class Setting:
    """Where a layer is built: its sizes, its dtype and the ranks that share its experts."""

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
    """Gradients after a step: the router's for the tokens of this rank, those of this rank's experts for all tokens."""

    def step(self, x_TH: Tensor, cotangent_TH: Tensor) -> Tensor:
        """Forward and backward; returns the output."""
        y_TH = self.forward(x_TH)
        y_TH.backward(cotangent_TH)
        return y_TH.detach()

    def reset(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None


Builder = Callable[[Setting, LayerWeights], Contestant]
"""Builds a layer from fp32 weights of all experts, of which it takes its share. Called on all ranks together."""


def parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """An own copy of `value` to train."""
    return nn.Parameter(value.to(dtype, copy=True))


def gradient(weight: Tensor) -> Tensor:
    """Its gradient, zero where none came: an expert without tokens is in no graph."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def stacked_gradient(weights: Sequence[Tensor]) -> Tensor:
    """The gradients of one weight of each expert as one tensor."""
    return torch.stack([gradient(weight) for weight in weights])


def from_gate_up(router_EH: Tensor, gate_up_LFH: Tensor, down_LHF: Tensor) -> LayerWeights:
    """The one layout from gate and up in one tensor (L, 2F, H), gate rows first."""
    gate_LFH, up_LFH = gate_up_LFH.chunk(2, dim=1)
    return LayerWeights(router_EH, gate_LFH, up_LFH, down_LHF)
