"""Which tokens see which in rows of packed documents, and under a sliding window, without a matrix of a whole row."""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Tokens that follow each other in a document; what comes next in it is another block.

    continues: it sees the block before it too, which is one of `window` tokens.
    """

    num_tokens: int
    continues: bool


@dataclass(frozen=True)
class Documents:
    """Documents that follow each other in rows and fill them: a token sees its own document up to itself.

    Attributes:
        offsets: int32 (N + 1,), where each of N documents begins in all rows one after the other, and their end.
        lengths: tokens of each document, at least 1.
        window: a token sees so many of them at most, itself among them; 0 for all.
    """

    offsets: Tensor
    lengths: tuple[int, ...]
    window: int = 0

    @classmethod
    def of(cls, document_starts: Tensor) -> "Documents":
        """From int64 (B, S), where in its row the document of each token begins. Waits for the device."""
        places = torch.arange(document_starts.shape[1], device=document_starts.device)
        firsts = (document_starts == places).flatten().nonzero().flatten()
        offsets = torch.cat([firsts, firsts.new_tensor([document_starts.numel()])])
        return cls(offsets.int(), tuple(offsets.diff().tolist()))

    @classmethod
    def whole_rows(cls, num_rows: int, seq_len: int, device: torch.device) -> "Documents":
        """A document in each row."""
        offsets = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * seq_len
        return cls(offsets, (seq_len,) * num_rows)

    def within(self, window: int) -> "Documents":
        """The same documents under a window."""
        return replace(self, window=window)

    @cached_property
    def blocks(self) -> list[Block]:
        """Those of all documents: a whole document where no window is shorter, else runs of `window` tokens."""
        return [block for length in self.lengths for block in self._blocks_of(length)]

    def _blocks_of(self, length: int) -> list[Block]:
        step = min(self.window or length, length)
        return [Block(min(step, length - first), first > 0) for first in range(0, length, step)]

    @cached_property
    def alike(self) -> dict[Block, list[int]]:
        """The places in `blocks` of each kind of block: those of a kind are computed together."""
        found = defaultdict(list)
        for place, block in enumerate(self.blocks):
            found[block].append(place)
        return found

    def mask_of(self, block: Block) -> Tensor | None:
        """Bool (tokens, window + tokens): what they see of the block before theirs and of their own; None: causal."""
        if not block.continues:
            return None
        whole = torch.ones(
            block.num_tokens, self.window + block.num_tokens, dtype=torch.bool, device=self.offsets.device
        )
        return whole.triu(1).tril(self.window)
