"""Context parallelism: the ranks of a group each hold some tokens of the same sequences, and see the keys of all."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dispatch.diagnosis.activity_tracker import ActivityTracker


class Context:
    """One rank's place among the ranks that share its sequences.

    A sequence is cut into as many chunks of consecutive tokens as there are ranks. All chunks have `chunk_size` tokens,
    but the last ones, which may have fewer or none.
    """

    # Not a dataclass: FSDP searches the fields of dataclasses among the inputs of a block for tensors, and would go
    # through the tracker too.
    def __init__(self, rank: int, size: int, group: dist.ProcessGroup, tracker: ActivityTracker | None = None) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.tracker = tracker or ActivityTracker()

    def chunk_size(self, seq_len: int) -> int:
        """Tokens of the first rank's chunk, the largest; the last ranks may have fewer, or none."""
        return -(-seq_len // self.size)

    def chunk(self, seq_len: int) -> range:
        """The indices of this rank's tokens in a sequence; empty where the ranks before it have all."""
        size = self.chunk_size(seq_len)
        return range(min(self.rank * size, seq_len), min((self.rank + 1) * size, seq_len))

    def local_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of x (B, S, ...), a view."""
        chunk = self.chunk(x.shape[1])
        return x[:, chunk.start : chunk.stop]

    def gather_tokens(self, x: Tensor, seq_len: int) -> Tensor:
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
        padded = _pad_tokens(x, context.chunk_size(seq_len)).contiguous()
        gathered = [torch.empty_like(padded) for _ in range(context.size)]
        context.tracker.run(dist.all_gather, gathered, padded, group=context.group)
        return torch.cat(gathered, dim=1)[:, :seq_len]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        context: Context = ctx.context
        size = context.chunk_size(ctx.seq_len)
        chunks = [each.contiguous() for each in _pad_tokens(grad, size * context.size).split(size, dim=1)]
        summed = torch.empty_like(chunks[context.rank])
        context.tracker.run(dist.reduce_scatter, summed, chunks, group=context.group)
        return summed[:, : len(context.chunk(ctx.seq_len))], None, None


def _pad_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """Pad x (B, S, ...) by zeros to (B, num_tokens, ...), so that all ranks send equally much."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, num_tokens - x.shape[1]))
