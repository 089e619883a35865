"""Cuts a stream of tokens into training sequences: every seq_len tokens, or by whole documents.

A window is one sequence of S tokens and its S targets, where -100 stands for a token without target.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from workers.data.mix import IndexArray
from workers.data.shards import FIRST, TARGET, FlagArray, TokenArray

NO_TARGET = -100  # the default ignore_index of torch's cross entropy


class Windows(Protocol):
    """The windows of one stream, by number from 0."""

    def __len__(self) -> int:
        """Number of windows."""

    def read(self, window: int) -> IndexArray:
        """int64 (3, S): input ids, targets, and for each input the index in the window at which its document begins."""

    def num_targets(self, window: int) -> int:
        """Number of targets of a window that are learned."""


@dataclass(frozen=True, eq=False)
class TextWindows:
    """Windows of seq_len tokens, each of which counts as one document: every target is learned.

    Targets do not overlap: the last target of a window is the first input of the next one.
    """

    tokens: TokenArray
    seq_len: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def read(self, window: int) -> IndexArray:
        start = window * self.seq_len
        tokens = self.tokens[start : start + self.seq_len + 1].astype(np.int64)
        return np.stack([tokens[:-1], tokens[1:], np.zeros_like(tokens[1:])])

    def num_targets(self, _window: int) -> int:
        return self.seq_len


class DocumentWindows:
    """Windows of whole documents: of as many consecutive ones as fit.

    A document is never split, unless it is longer than a window: then it is cut into pieces of seq_len tokens. The rest
    of a window is filled with the tokens that follow in the stream, so that no padding is routed; these have no
    targets, as they are learned in the next window. The first token of a document is never a target.
    """

    def __init__(self, tokens: TokenArray, flags: FlagArray, seq_len: int) -> None:
        self._tokens, self._flags, self._seq_len = tokens, flags, seq_len
        self._bounds = _pack(_pieces(flags, seq_len), seq_len)  # (windows + 1,)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def read(self, window: int) -> IndexArray:
        indices = self._bounds[window] + np.arange(self._seq_len + 1)
        tokens = self._tokens.take(indices, mode="wrap").astype(np.int64)  # after the end the stream begins again
        is_first = self._flags.take(indices[:-1], mode="wrap") & FIRST > 0
        starts = np.maximum.accumulate(np.where(is_first, np.arange(self._seq_len), 0))
        return np.stack([tokens[:-1], np.where(self._is_learned(window), tokens[1:], NO_TARGET), starts])

    def num_targets(self, window: int) -> int:
        return int(self._is_learned(window).sum())

    def _is_learned(self, window: int) -> npt.NDArray[np.bool_]:
        """Which of the S targets are learned, bool (S,)."""
        start, stop = self._bounds[window], self._bounds[window + 1]
        flags = self._flags.take(np.arange(start + 1, start + self._seq_len + 1), mode="wrap")
        # The target of a window's last token is the first token after the window. Inside a long document that token is
        # learned; after a whole document, or at the end of the stream, it is the first of another document.
        is_inside = np.arange(self._seq_len) < stop - start
        is_learned: npt.NDArray[np.bool_] = is_inside & (flags & TARGET > 0) & (flags & FIRST == 0)
        return is_learned


def _pieces(flags: FlagArray, seq_len: int) -> IndexArray:
    """Where each document, or each piece of a long one, begins, and the end of the stream."""
    starts = np.flatnonzero(np.asarray(flags) & FIRST)
    stops = np.append(starts[1:], len(flags))
    num_pieces = -(-(stops - starts) // seq_len)
    offsets = np.arange(num_pieces.sum()) - np.repeat(num_pieces.cumsum() - num_pieces, num_pieces)
    return np.append(np.repeat(starts, num_pieces) + offsets * seq_len, len(flags)).astype(np.int64)


def _pack(pieces: IndexArray, seq_len: int) -> IndexArray:
    """Where each window begins, and the end of the stream: as many pieces as fit, in order."""
    bounds: list[Any] = [0]
    while bounds[-1] < pieces[-1]:
        bounds.append(pieces[np.searchsorted(pieces, bounds[-1] + seq_len, side="right") - 1])
    return np.array(bounds, dtype=np.int64)
