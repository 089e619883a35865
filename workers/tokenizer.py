"""Text to token ids and back: bytes as tokens, or a tokenizer file of Hugging Face's `tokenizers`."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tokenizers

GIVE_A_FILE = "give the path of a tokenizer.json of Hugging Face's tokenizers"
IdArray = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """What data preparation and generation need. The last id, `eod_id`, ends a document and stands for no text."""

    @property
    def name(self) -> str:
        """Says which tokenizer it is: two of the same name give the same ids."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document token among them."""

    @property
    def eod_id(self) -> int:
        """The end-of-document token: vocab_size - 1."""

    def encode(self, text: str | bytes) -> IdArray:
        """Ids of `text` (bytes are UTF-8), without an end-of-document token."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end-of-document tokens are left out, incomplete characters become U+FFFD."""


class ByteTokenizer:
    """Each byte of UTF-8 is a token; 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eod_id = 256

    def encode(self, text: str | bytes) -> IdArray:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if token != self.eod_id).decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizers` file with one more id at the end, for the end of a document."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", name: str) -> None:
        self.name = name
        # Ids may have gaps, so that the number of entries would not be an unused id.
        self.eod_id = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = self.eod_id + 1
        self._tokenizer = tokenizer

    def encode(self, text: str | bytes) -> IdArray:
        string = text.decode() if isinstance(text, bytes) else text
        return np.array(self._tokenizer.encode(string, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))  # which passes over ids that its file does not have, such as eod_id


def load_tokenizer(path: str | None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        ValueError: the file is missing or is no tokenizer file, or the package `tokenizers` is not installed.
    """
    if path is None:
        return ByteTokenizer()
    file = Path(path).expanduser()
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"data.tokenizer {file} cannot be read ({error.strerror}); {GIVE_A_FILE}") from error
    try:
        import tokenizers  # here, since byte-level runs do without it
    except ModuleNotFoundError:
        raise ValueError("data.tokenizer needs a package: pip install 'trimtab[tokenizers]'") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the package raises bare Exception or ValueError for every kind of bad file
        raise ValueError(f"data.tokenizer {file} holds no tokenizer ({error}); {GIVE_A_FILE}") from error
    return HuggingFaceTokenizer(tokenizer, f"{file.name}:{hashlib.sha256(raw).hexdigest()[:16]}")
