"""Which tokens see which in rows of packed documents and under a sliding window, without a mask of a whole row."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from workers.distributed.context import Context


class QueryBlock(NamedTuple):
    """Consecutive queries of a document, and how many keys before their own they may see."""

    num_tokens: int
    num_before: int


class Cut(NamedTuple):
    """All rows one after the other, cut into consecutive parts.

    Attributes:
        parts: the number of tokens of each part.
        blocks: the parts that are this rank's queries, in order.
        key_parts: for each block, the range of parts whose keys it sees: its own, and the part of `num_before` tokens
            before it.
    """

    parts: list[int]
    blocks: list[QueryBlock]
    key_parts: list[range]

    @property
    def indices_by_block(self) -> dict[QueryBlock, list[int]]:
        """For each size of block, its indices in `blocks`: blocks of one size are computed in one call."""
        indices = defaultdict(list)
        for index, block in enumerate(self.blocks):
            indices[block].append(index)
        return indices


@dataclass(frozen=True)
class Documents:
    """Consecutive documents that fill rows: a token sees the tokens of its own document up to itself.

    Attributes:
        offsets: int32 (N + 1,), where each of N documents begins if all rows are laid one after the other, and the end.
        lengths: the number of tokens of each document, at least 1.
        seq_len: the number of tokens of a row.
        window: how many tokens a token sees at most, itself among them; 0 for all.
        context: the ranks that share the rows; None: this rank has whole rows.
    """

    offsets: Tensor
    lengths: tuple[int, ...]
    seq_len: int
    window: int = 0
    context: Context | None = None

    @classmethod
    def from_starts(cls, document_starts: Tensor, context: Context | None = None) -> "Documents":
        """From int64 (B, S), the index in its row at which the document of each token begins. Waits for the device."""
        seq_len = document_starts.shape[1]
        columns = torch.arange(seq_len, device=document_starts.device)
        firsts = (document_starts == columns).flatten().nonzero().flatten()
        offsets = torch.cat([firsts, firsts.new_tensor([document_starts.numel()])])
        return cls(offsets.int(), tuple(offsets.diff().tolist()), seq_len, context=context)

    @classmethod
    def whole_rows(cls, num_rows: int, seq_len: int, device: torch.device) -> "Documents":
        """One document in each row."""
        offsets = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * seq_len
        return cls(offsets, (seq_len,) * num_rows, seq_len)

    def with_window(self, window: int) -> "Documents":
        """The same documents under a window."""
        return replace(self, window=window)

    @cached_property
    def window_cut(self) -> Cut:
        """Blocks of a window's tokens at most, so that a mask of one is small; without a window as `document_cut`."""
        return self._cut(self.window)

    @cached_property
    def document_cut(self) -> Cut:
        """A block for each document that this rank has tokens of."""
        return self._cut(0)

    @cached_property
    def sequence_arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seq_q, cu_seq_k, max_q and max_k of torch's `varlen_attn` for the blocks of `document_cut`."""
        # Computed once for all layers: a copy from pageable memory can make the host wait for the device.
        blocks = self.document_cut.blocks
        counts = [block.num_tokens for block in blocks], [sum(block) for block in blocks]
        query_offsets, key_offsets = (
            torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=self.offsets.device) for each in counts
        )
        return query_offsets, key_offsets, max(counts[0]), max(counts[1])

    def _cut(self, max_tokens: int) -> Cut:
        """Cut every document. max_tokens: of a block; 0 for no limit."""
        cut = Cut([], [], [])
        for first, end in self._spans():
            begin, stop = self._clamp_to_rank(first), self._clamp_to_rank(end)
            if begin == stop:
                cut.parts.append(end - first)
                continue
            # Tokens of the document on ranks before this one, as many of them as the first block sees.
            num_before = min(begin - first, self.window or begin - first)
            cut.parts.extend(filter(None, (begin - num_before - first, num_before)))
            step = max_tokens or stop - begin
            for start in range(begin, stop, step):
                block = QueryBlock(min(step, stop - start), num_before if start == begin else step)
                cut.key_parts.append(range(len(cut.parts) - (block.num_before > 0), len(cut.parts) + 1))
                cut.parts.append(block.num_tokens)
                cut.blocks.append(block)
            cut.parts.extend(filter(None, (end - stop,)))
        return cut

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Where in its row each document begins and ends."""
        first = 0
        for length in self.lengths:
            yield first, first + length
            first = (first + length) % self.seq_len

    def _clamp_to_rank(self, index: int) -> int:
        """The index in a row, clamped to the range of this rank's tokens, whose end is included."""
        chunk = self.context.chunk(self.seq_len) if self.context else range(self.seq_len)
        return min(max(index, chunk.start), chunk.stop)

    def block_mask(self, block: QueryBlock) -> Tensor | None:
        """The mask of a block, bool (queries, keys before + own keys); None for causal order alone."""
        tokens, before = block
        if not before and tokens <= (self.window or tokens):
            return None
        mask = torch.ones(tokens, before + tokens, dtype=torch.bool, device=self.offsets.device).tril(before)
        return mask.triu(before - self.window + 1) if self.window else mask
