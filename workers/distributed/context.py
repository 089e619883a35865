"""Context parallelism: the ranks of a group each hold some tokens of the same sequences, and see the keys of all."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dispatch.diagnosis.activity_tracker import ActivityTracker


class Context:
    """One rank's place among the ranks that share its sequences: each has a run of tokens, the last may have fewer."""

    # Not a dataclass: FSDP searches the fields of dataclasses among the inputs of a block for tensors, and would go
    # through the tracker too.
    def __init__(self, rank: int, size: int, group: dist.ProcessGroup, tracker: ActivityTracker | None = None) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.tracker = tracker or ActivityTracker()

    def longest(self, seq_len: int) -> int:
        """Tokens of each rank but the last ones, which may have fewer."""
        return -(-seq_len // self.size)

    def chunk(self, seq_len: int) -> range:
        """The indices of this rank's tokens in a sequence; empty where the ranks before it have all."""
        longest = self.longest(seq_len)
        return range(min(self.rank * longest, seq_len), min((self.rank + 1) * longest, seq_len))

    def part(self, x: Tensor) -> Tensor:
        """This rank's tokens of (B, S, ...), a view."""
        chunk = self.chunk(x.shape[1])
        return x[:, chunk.start : chunk.stop]

    def whole(self, x: Tensor, seq_len: int) -> Tensor:
        """Gather the tokens of all ranks: (B, seq_len, ...), from each rank's (B, its tokens, ...).

        In backward the gradients of the ranks are summed, and each gets those of its tokens. Collective over the group,
        in backward too.
        """
        gathered: Tensor = _Gather.apply(x, seq_len, self)
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seq_len: int, context: Context) -> Tensor:
        ctx.seq_len, ctx.context = seq_len, context
        longest = context.longest(seq_len)
        own = _filled(x, longest).contiguous()
        gathered = [torch.empty_like(own) for _ in range(context.size)]
        context.tracker.run(dist.all_gather, gathered, own, group=context.group)
        return torch.cat(gathered, dim=1)[:, :seq_len]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        context: Context = ctx.context
        longest = context.longest(ctx.seq_len)
        parts = [each.contiguous() for each in _filled(grad, longest * context.size).split(longest, dim=1)]
        own = torch.empty_like(parts[context.rank])
        context.tracker.run(dist.reduce_scatter, own, parts, group=context.group)
        return own[:, : len(context.chunk(ctx.seq_len))], None, None


def _filled(x: Tensor, num_places: int) -> Tensor:
    """Pad x (B, S, ...) by zeros to (B, num_places, ...), so that all ranks send equally much."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, num_places - x.shape[1]))
