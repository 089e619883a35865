"""The stacked expert weights of one layer call, and their gradients, added up in place over its chunks.

Shapes: L local experts, H hidden, F ffn_hidden, G = 2F.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dispatch.exchange.buffer_pool import BufferPool


@dataclass
class WeightGrads:
    """Adds up the weight gradients of the chunks of one layer call.

    Autograd would have every chunk fill a stacked tensor with the gradients of all experts, and sum these afterwards.
    """

    buffer_pool: BufferPool
    _stacks: tuple[Tensor, ...] = ()
    _written: set[tuple[int, int]] = field(default_factory=set)

    def share(self, gate_up_LGH: Tensor, down_LHF: Tensor) -> tuple[Tensor, Tensor]:
        """The weights for the chunks to use. Their backward, after that of all chunks, returns the gradients' sums."""
        shared: tuple[Tensor, Tensor] = _Share.apply(gate_up_LGH, down_LHF, self)
        return shared

    def add(self, index: int, expert: int, left: Tensor, right: Tensor, weights: tuple[Tensor, Tensor]) -> None:
        """Add left @ right to the gradient of one expert in `weights[index]`: 0 is gate and up, 1 is down."""
        if not self._stacks:
            self._stacks = tuple(self.buffer_pool.empty(*stack.shape, like=stack) for stack in weights)
        target = self._stacks[index][expert]
        if (index, expert) in self._written:
            target.addmm_(left, right)
        else:
            torch.mm(left, right, out=target)
            self._written.add((index, expert))

    def take(self, weights: Sequence[Tensor], autograd_grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the sums, and begin new ones for the next backward through the same graph.

        autograd_grads: what the grouped and fused experts return through autograd, None from the looped ones; they are
        added. An expert without rows gets zero.
        """
        if not self._stacks:
            pairs = zip(weights, autograd_grads, strict=True)
            return [torch.zeros_like(stack) if grad is None else grad for stack, grad in pairs]
        stacks, written = self._stacks, self._written
        self._stacks, self._written = (), set()
        for index, (stack, grad) in enumerate(zip(stacks, autograd_grads, strict=True)):
            for expert in range(len(stack)):
                if (index, expert) not in written:
                    stack[expert].zero_()
            if grad is not None:
                stack.add_(grad)
        return list(stacks)


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one layer call in its compute dtype, shared by its chunks, and the sums of their gradients."""

    gate_up_LGH: Tensor
    down_LHF: Tensor
    grads: WeightGrads


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_LGH: Tensor, down_LHF: Tensor, grads: WeightGrads) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the looped experts return None: no stack of zeros for it
        ctx.grads = grads
        ctx.save_for_backward(gate_up_LGH, down_LHF)
        return gate_up_LGH.view_as(gate_up_LGH), down_LHF.view_as(down_LHF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *ctx.grads.take(ctx.saved_tensors, grads), None
