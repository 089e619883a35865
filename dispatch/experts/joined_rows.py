"""A stacked parameter of a rank's own experts with copies of other experts behind it, as one stack for the kernels.

Shapes: L own experts, C copies of other ranks' experts.
"""

from typing import Any

import torch
from torch import Tensor, nn


class JoinedRows:
    """One parameter, (L, ...), and the rows of C copies behind it, in one block of memory.

    The parameter becomes a view of the block's first L rows. copies: (C, ...), a view of the other rows. It is a
    leaf that requires a gradient if the parameter does, but no parameter: neither the optimizer nor a checkpoint sees
    it. `copies.grad` accumulates, over micro-batches too, until `take_gradient`.
    """

    def __init__(self, own: nn.Parameter, num_copies: int) -> None:
        num_own = len(own)
        self._own = own
        self._rows = torch.cat([own.detach(), own.new_empty(num_copies, *own.shape[1:])])
        own.data = self._rows[:num_own]  # the same Parameter, so that the optimizer's state stays with it
        self.copies = self._rows[num_own:].detach().requires_grad_(own.requires_grad)

    def stack(self) -> Tensor:
        """All rows, (L + C, ...), not copied; their gradients go to the parameter and to `copies`."""
        stack: Tensor = _Joined.apply(self._own, self.copies, self._rows)
        return stack

    def take_gradient(self) -> Tensor:
        """Return the gradient of the copies and clear it; zeros where no backward has made one."""
        grad, self.copies.grad = self.copies.grad, None
        return torch.zeros_like(self.copies) if grad is None else grad

    def separate(self) -> None:
        """Give the parameter memory of its own again, without the copies."""
        self._own.data = self._own.detach().clone()


class JoinedParameters(nn.Module):
    """A module with stacked parameters that may have rows of copies behind them.

    joined: by the name of the parameter; empty on a rank without copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[str, JoinedRows] = {}

    def rows(self, name: str) -> Tensor:
        """A stacked parameter with the rows of this rank's copies, if it has any, behind it."""
        own: Tensor = getattr(self, name)
        return self.joined[name].stack() if name in self.joined else own


class _Joined(torch.autograd.Function):
    # Both parts lie in `rows` already; as arguments they only get their gradients.
    @staticmethod
    def forward(ctx: Any, own: Tensor, _copies: Tensor, rows: Tensor) -> Tensor:
        ctx.num_own = len(own)
        return rows.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad[: ctx.num_own], grad[ctx.num_own :], None
