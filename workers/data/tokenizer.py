"""Text to token ids and back: bytes as tokens, or a tokenizer file of Hugging Face's `tokenizers`."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dispatch.errors import InvalidValue

if TYPE_CHECKING:
    import tokenizers

SETTINGS_FILE = "tokenizer_config.json"
END_FILES = ("generation_config.json", "config.json")  # of a model: they name its end token by id
GIVE_A_FILE = "give the path of a tokenizer.json of Hugging Face's tokenizers"
IdArray = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """What data preparation and generation need of a tokenizer. The token `eod_id` ends a document and has no text."""

    @property
    def name(self) -> str:
        """Identifies the tokenizer: two tokenizers of the same name give the same ids."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document token among them."""

    @property
    def eod_id(self) -> int:
        """The end-of-document token."""

    def encode(self, text: str | bytes) -> IdArray:
        """Ids of `text` (bytes are UTF-8), without an end-of-document token."""

    def encode_with_offsets(self, text: str) -> tuple[IdArray, IdArray]:
        """The ids as of `encode`, and for each the index in `text` of the character at which it begins."""

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

    def encode_with_offsets(self, text: str) -> tuple[IdArray, IdArray]:
        num_bytes = [len(character.encode()) for character in text]
        return self.encode(text), np.repeat(np.arange(len(text)), num_bytes)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if token != self.eod_id).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face's `tokenizers`. eod_id: its token that ends a document; None adds an id for it."""

    eod_is_added: bool

    def __init__(self, tokenizer: "tokenizers.Tokenizer", name: str, eod_id: int | None = None) -> None:
        self.name = name
        # The largest id and not the number of entries, since ids may have gaps.
        unused = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod_is_added = eod_id is None
        self.eod_id = unused if eod_id is None else eod_id
        self.vocab_size = max(unused, self.eod_id + 1)
        self._tokenizer = tokenizer

    def encode(self, text: str | bytes) -> IdArray:
        string = text.decode() if isinstance(text, bytes) else text
        return np.array(self._tokenizer.encode(string, add_special_tokens=False).ids, dtype=np.uint32)

    def encode_with_offsets(self, text: str) -> tuple[IdArray, IdArray]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32), np.array(
            [start for start, _ in encoding.offsets], dtype=np.int64
        )

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([token for token in ids if token != self.eod_id])


def load_tokenizer(path: str | None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    The end of a document is the eos_token of a tokenizer_config.json beside the file, or else the eos_token_id of the
    model's configuration there. A model that was trained already knows this token, and has no embedding for a new id.

    Raises:
        InvalidValue: the file is missing or is no tokenizer file, or the package `tokenizers` is not installed.
    """
    if path is None:
        return ByteTokenizer()
    file = Path(path).expanduser()
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise InvalidValue(f"data.tokenizer {file} cannot be read ({error.strerror}); {GIVE_A_FILE}") from error
    try:
        import tokenizers  # imported here, since byte-level runs do not need the package
    except ModuleNotFoundError:
        raise InvalidValue("data.tokenizer needs a package: pip install 'trimtab[tokenizers]'") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the package raises bare Exception or ValueError for every kind of bad file
        raise InvalidValue(f"data.tokenizer {file} holds no tokenizer ({error}); {GIVE_A_FILE}") from error
    name = f"{file.name}:{hashlib.sha256(raw).hexdigest()[:16]}"
    end_token = special_token(read_settings(file.with_name(SETTINGS_FILE)), "eos_token")
    if end_token is None:
        eod_id = _end_id(file.parent)
        known = eod_id is not None and tokenizer.id_to_token(eod_id) is not None
        return HuggingFaceTokenizer(tokenizer, f"{name}:{eod_id}" if known else name, eod_id if known else None)
    eod_id = tokenizer.token_to_id(end_token)
    if eod_id is None:
        raise InvalidValue(f"{file} has no token {end_token!r:.60}, which {SETTINGS_FILE} beside it names as eos_token")
    return HuggingFaceTokenizer(tokenizer, f"{name}:{eod_id}", eod_id)


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises InvalidValue if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidValue(f"{path} is not a JSON file of names and values: {error}") from error
    if not isinstance(settings, dict):
        raise InvalidValue(f"{path} is not a JSON file of names and values: it is {type(settings).__name__}")
    return settings


def special_token(settings: dict[str, Any], name: str) -> str | None:
    """A token such as eos_token of a tokenizer_config.json, where it is a text or an object; None if it is neither."""
    token = settings.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _end_id(folder: Path) -> int | None:
    """The eos_token_id of a model's configuration in a folder, the first where there are several; None without one."""
    for name in END_FILES:
        ids = read_settings(folder / name).get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if type(first) is int and first >= 0:
            return first
    return None
