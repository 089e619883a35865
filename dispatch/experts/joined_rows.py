"""A stacked parameter of a rank's own experts and the copies behind it, in one block, so that kernels see one stack.

Shapes: L own experts, C copies of other ranks' experts.
"""

from typing import Any

import torch
from torch import Tensor, nn


class JoinedRows:
    """One parameter, (L, ...), with room for the rows of C copies behind it.

    copies: (C, ...), a leaf that is no parameter: neither the optimizer nor a checkpoint knows it. Its gradient adds up
    in `copies.grad`, over micro-batches too, and the owners of the experts are to get it.
    """

    def __init__(self, own: nn.Parameter, num_copies: int) -> None:
        num_own = len(own)
        self._own = own
        self._rows = torch.cat([own.detach(), own.new_empty(num_copies, *own.shape[1:])])
        own.data = self._rows[:num_own]
        self.copies = self._rows[num_own:].detach().requires_grad_(own.requires_grad)

    def stack(self) -> Tensor:
        """(L + C, ...), without copying; gradients go to the parameter and to `copies`."""
        stack: Tensor = _Joined.apply(self._own, self.copies, self)
        return stack

    def whole(self) -> Tensor:
        """What `stack` gives, detached."""
        return self._rows.detach()

    def take_gradient(self) -> Tensor:
        """The gradient of the copies, which then starts anew; zero where no backward brought any."""
        grad, self.copies.grad = self.copies.grad, None
        return torch.zeros_like(self.copies) if grad is None else grad

    def part(self) -> None:
        """Give the parameter memory of its own again."""
        self._own.data = self._own.detach().clone()


class JoinedParameters(nn.Module):
    """A module with stacked parameters that may have rows of copies behind them.

    joined: those of a rank that holds copies, by the name of the parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[str, JoinedRows] = {}

    def rows(self, name: str) -> Tensor:
        """A stacked parameter, and behind it the rows of the copies that this rank holds."""
        own: Tensor = getattr(self, name)
        return self.joined[name].stack() if name in self.joined else own


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, _copies: Tensor, joined: JoinedRows) -> Tensor:
        ctx.num_own = len(own)
        return joined.whole()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad[: ctx.num_own], grad[ctx.num_own :], None
