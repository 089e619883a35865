"""The sequences that one rank continues at the same time, and the model's inputs for each forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dispatch.values import to_device
from workers.model.attention import KeyValueCache

# Called with the index of a sequence and a token that was added to it.
OnToken = Callable[[int, int], None]


class TokenSpan(NamedTuple):
    """Tokens that one forward reads of a sequence: `num_tokens` of its ids, from index `first` on.

    sequence: the index of the sequence.
    """

    sequence: int
    first: int
    num_tokens: int


# Called before each forward with the spans that it reads, one for each of its rows; there may be none.
OnRead = Callable[[Sequence[TokenSpan]], None]


@dataclass
class DecodingSequence:
    """A prompt and the tokens that were generated for it.

    ids: token ids of both. new_ids: of the generated tokens. first: index in ids of the token at position 0 of the
    model's input; above 0 once the text is longer than the model reads. num_cached: tokens from `first` on that the
    cache holds.
    """

    index: int
    ids: list[int]
    generator: torch.Generator
    new_ids: list[int] = field(default_factory=list)
    first: int = 0
    num_cached: int = 0

    @property
    def unread(self) -> list[int]:
        """Ids of the tokens that the model has not read yet."""
        return self.ids[self.first + self.num_cached :]


class DecodingBatch:
    """Unfinished sequences of one rank, in the order of the rows of their cache; there may be none.

    Args:
        sequences: each of one token or more.
        max_new_tokens: a sequence ends after so many new tokens, or earlier at eod_id, which is not added to it.
        max_seq_len: longest sequence that the model reads. Of a longer one the last max_seq_len / 2 tokens are read
            again, and it is continued from these.
        on_token: called with each token that is added.
        on_read: called with the tokens that each forward reads.
    """

    def __init__(
        self,
        sequences: Sequence[DecodingSequence],
        *,
        max_new_tokens: int,
        max_seq_len: int,
        eod_id: int,
        on_token: OnToken | None = None,
        on_read: OnRead | None = None,
    ) -> None:
        self.running = list(sequences)
        self._on_read = on_read or (lambda _spans: None)
        self._on_token = on_token or (lambda _index, _token_id: None)
        self._max_new_tokens, self._max_seq_len, self._eod_id = max_new_tokens, max_seq_len, eod_id
        for sequence in sequences:
            sequence.first = max(0, len(sequence.ids) - max_seq_len)
        self.num_prompt_tokens = sum(len(sequence.unread) for sequence in sequences)
        self._cache = self._empty_cache()

    def next_inputs(self, device: torch.device) -> dict[str, Any]:
        """Arguments of the next `Decoder.forward`: whole sequences at first, then the one new token of each.

        Calls on_read, and counts these tokens as cached.
        """
        if any(len(each.ids) - each.first > self._max_seq_len for each in self.running):
            self._start_over()
        unread = [sequence.unread for sequence in self.running]
        self._on_read([
            TokenSpan(each.index, each.first + each.num_cached, len(ids))
            for each, ids in zip(self.running, unread, strict=True)
        ])  # fmt: skip
        lengths = torch.tensor([len(ids) for ids in unread], dtype=torch.int64)
        token_ids = torch.zeros(len(unread), max(map(len, unread), default=1), dtype=torch.int64)
        for row, ids in zip(token_ids, unread, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        token_mask = torch.arange(token_ids.shape[1]) < lengths.unsqueeze(1)
        positions = torch.tensor([[sequence.num_cached] for sequence in self.running], dtype=torch.int64)
        is_first = not any(sequence.num_cached for sequence in self.running)
        for sequence, ids in zip(self.running, unread, strict=True):
            sequence.num_cached += len(ids)
        return {
            "token_ids": to_device(token_ids, device),
            "token_mask": to_device(token_mask, device),
            "positions": None if is_first else to_device(positions, device),
            "cache": self._cache,
            "logits_at": to_device(lengths - 1, device),
        }

    def append(self, chosen: Sequence[int]) -> None:
        """Add the next token of each running sequence; those that end leave the batch and the cache."""
        rows = []
        for row, (sequence, token_id) in enumerate(zip(self.running, chosen, strict=True)):
            if token_id != self._eod_id:
                sequence.ids.append(token_id)
                sequence.new_ids.append(token_id)
                self._on_token(sequence.index, token_id)
            if token_id != self._eod_id and len(sequence.new_ids) < self._max_new_tokens:
                rows.append(row)
        if len(rows) < len(self.running):
            self.running = [self.running[row] for row in rows]
            self._cache.keep_rows(rows)

    def _start_over(self) -> None:
        """Cut the sequences that are too long for the model, and empty the cache, so that all are read again.

        Those that are short enough too: a forward reads either whole sequences or one new token in all its rows.
        """
        for sequence in self.running:
            if len(sequence.ids) - sequence.first > self._max_seq_len:
                sequence.first = len(sequence.ids) - max(1, self._max_seq_len // 2)
            sequence.num_cached = 0
        self._cache = self._empty_cache()

    def _empty_cache(self) -> KeyValueCache:
        longest = max((len(each.unread) - len(each.new_ids) for each in self.running), default=1)
        return KeyValueCache(min(self._max_seq_len, longest + self._max_new_tokens))
