"""Encodes documents to token ids, with flags for each token: learned, first of its document."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from workers.data.chat import ChatTemplate, Piece, read_conversations
from workers.data.shards import FIRST, TARGET, FlagArray
from workers.data.text import Document, read_pieces
from workers.data.tokenizer import IdArray, Tokenizer


@dataclass(frozen=True, eq=False)
class Encoded:
    """A part of a stream of tokens.

    flags: TARGET and FIRST of each token (workers.data.shards). num_text_bytes: UTF-8 bytes of the tokens' text.
    num_read: bytes of the file that were read since the part before.
    """

    ids: IdArray
    flags: FlagArray
    num_text_bytes: int
    num_read: int


@dataclass(frozen=True)
class DocumentEncoder:
    """Encodes files. Without a template a file is one document; with one, each conversation in it is a document."""

    tokenizer: Tokenizer
    template: ChatTemplate | None = None

    def encode(self, document: Document, hash_piece: Callable[[bytes], None]) -> Iterator[Encoded]:
        """The tokens of a file, or of a part of it, piece by piece.

        Args:
            hash_piece: called with the bytes of the file, each once and in order, as they are read.
        """
        if self.template is None:
            yield from self._encode_text(document, hash_piece)
            return
        for piece in read_pieces(document):
            hash_piece(piece)
        for conversation in read_conversations(document, self.template):
            yield self._encode_conversation(conversation)
        yield Encoded(np.zeros(0, np.uint32), np.zeros(0, np.uint8), 0, document.stop - document.start)

    def _encode_text(self, document: Document, hash_piece: Callable[[bytes], None]) -> Iterator[Encoded]:
        first = FIRST
        for piece in read_pieces(document):
            hash_piece(piece)
            ids = self.tokenizer.encode(piece)
            yield Encoded(ids, _flags(len(ids), first), len(piece), len(piece))
            first = 0 if len(ids) else first
        yield Encoded(np.array([self.tokenizer.eod_id], np.uint32), _flags(1, first), 0, 0)

    def _encode_conversation(self, pieces: Sequence[Piece]) -> Encoded:
        """Encode a conversation as one text, as the model reads it. A token is learned if its first character is."""
        text = "".join(piece.text for piece in pieces)
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        ends = np.cumsum([len(piece.text) for piece in pieces])
        is_learned = np.array([piece.is_learned for piece in pieces])[np.searchsorted(ends, offsets, side="right")]
        if self.tokenizer.eod_id not in ids[is_learned]:
            # The model must learn the token that ends generation. Most templates write it after each answer; where no
            # answer has it, it is added at the end.
            ids, is_learned = np.append(ids, self.tokenizer.eod_id), np.append(is_learned, True)
        flags = is_learned.astype(np.uint8) * np.uint8(TARGET)
        flags[0] |= FIRST
        return Encoded(ids, flags, len(text.encode()), 0)


def _flags(size: int, first: int) -> FlagArray:
    flags = np.full(size, TARGET, dtype=np.uint8)
    flags[:1] |= first
    return flags
