"""Prepared text as a rank reads it: memory-mapped token streams, and meta.json, which describes them."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dispatch.errors import InvalidValue
from workers.data.text import Split

FORMAT = 2  # raise it when the code makes other files of the same text
META_FILE = "meta.json"
SPLITS: tuple[Split, ...] = ("train", "val")
REBUILD = "prepare the text again with --data.rebuild true"

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
FlagArray = npt.NDArray[np.uint8]
# Flags of a token: it is learned as a target; it is the first of its document.
TARGET, FIRST = 1, 2


class DataDamaged(InvalidValue):
    """A prepared file is not what its description says."""


@dataclass(frozen=True)
class FileStamp:
    """Identifies a file, to tell later whether it is still the same."""

    name: str
    num_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class SplitSize:
    """How much of one source is in one split. A document's end is a token, but no byte of text."""

    num_tokens: int
    num_text_bytes: int


@dataclass(frozen=True)
class SourceMeta:
    """What was prepared from one source. num_copies: files with the text of an earlier file, whose split they share."""

    name: str
    root: str
    train: SplitSize
    val: SplitSize
    files: tuple[FileStamp, ...]
    num_copies: int = 0

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Read back what `asdict` wrote."""
        sizes = {split: SplitSize(**fields[split]) for split in SPLITS}
        files = tuple(FileStamp(**file) for file in fields["files"])
        return cls(fields["name"], fields["root"], **sizes, files=files, num_copies=fields["num_copies"])


@dataclass(frozen=True)
class DatasetMeta:
    """The content of meta.json, which describes prepared tokens."""

    tokenizer: str
    vocab_size: int
    sources: tuple[SourceMeta, ...]
    shards: tuple[FileStamp, ...]  # one or two per split, tokens and flags: of all sources, one after the other
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Equal for equal token streams, from whatever folder their text came."""
        content = [self.vocab_size, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        """Text of meta.json."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check meta.json. Raises `DataDamaged`, also where there is none."""
        path = folder / META_FILE
        try:
            fields = json.loads(path.read_text())
            if fields["format"] != FORMAT:
                raise DataDamaged(f"{path} has format {fields['format']}, this version reads {FORMAT}; {REBUILD}")
            return cls(
                tokenizer=fields["tokenizer"],
                vocab_size=int(fields["vocab_size"]),
                sources=tuple(SourceMeta.from_json(source) for source in fields["sources"]),
                shards=tuple(FileStamp(**shard) for shard in fields["shards"]),
            )
        except FileNotFoundError:
            shared = "on a cluster, data.cache_dir must be a folder that every node sees"
            raise DataDamaged(f"no prepared text at {folder} on this machine; {REBUILD}; {shared}") from None
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise DataDamaged(f"{path} is damaged ({error!r}); {REBUILD}") from error


@dataclass(frozen=True, eq=False)
class Dataset:
    """Token streams of a run, mapped into memory: every rank of a machine shares the same pages."""

    path: Path
    meta: DatasetMeta
    train: TokenArray  # (tokens,) all sources
    val: tuple[TokenArray, ...]  # one stream per source
    train_flags: FlagArray | None = None  # as train; None: every token is a target, and documents do not matter
    val_flags: tuple[FlagArray, ...] | None = None

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open what `prepare_dataset` made, without looking at the text that it came from: for workers.

        Raises:
            DataDamaged: nothing is there, or a file is not what was written.
        """
        folder = Path(path)
        meta = DatasetMeta.read(folder)
        train, val = (_map_shard(folder, meta, split, token_dtype(meta.vocab_size)) for split in SPLITS)
        bounds = np.cumsum([source.val.num_tokens for source in meta.sources])[:-1]
        dataset = cls(folder, meta, train, tuple(np.split(val, bounds)))
        if not any(shard.name == flags_name("train") for shard in meta.shards):
            return dataset
        train_flags, val_flags = (_map_shard(folder, meta, split, np.dtype("u1"), flags_name) for split in SPLITS)
        return replace(dataset, train_flags=train_flags, val_flags=tuple(np.split(val_flags, bounds)))

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in the order of `val` and of a batch's `source_B`."""
        return tuple(source.name for source in self.meta.sources)

    @property
    def train_by_source(self) -> tuple[TokenArray, ...]:
        """The part of `train` that comes from each source, in the order of `source_names`."""
        return tuple(np.split(self.train, self._train_bounds))

    @property
    def train_flags_by_source(self) -> tuple[FlagArray, ...] | None:
        """Flags of the tokens in `train_by_source`; None if there are no flags."""
        return None if self.train_flags is None else tuple(np.split(self.train_flags, self._train_bounds))

    @property
    def _train_bounds(self) -> npt.NDArray[np.int64]:
        return np.cumsum([source.train.num_tokens for source in self.meta.sources], dtype=np.int64)[:-1]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, including that of the end of a document."""
        return self.meta.vocab_size

    @property
    def tokens_per_byte(self) -> tuple[float, ...]:
        """Held-out tokens per byte of text, by source: a little above 1 for bytes, below 1 for other tokenizers."""
        return tuple(source.val.num_tokens / source.val.num_text_bytes for source in self.meta.sources)

    @property
    def digest(self) -> str:
        """Equal for equal token streams: a resumed run can tell whether it reads what it read before."""
        return self.meta.digest

    def bits_per_byte(
        self, nats_per_source: Sequence[float], tokens_per_source: Sequence[int]
    ) -> tuple[float, dict[str, float]]:
        """Turn summed losses on held-out tokens into bits per byte of text, which models of any tokenizer share.

        The bytes of a source are its predicted tokens over its `tokens_per_byte`: exact if all tokens were predicted.

        Args:
            nats_per_source: summed loss, by source, in the order of `source_names`.
            tokens_per_source: how many tokens that is the sum of; 0 for a source that was not read.
        Returns:
            over all that was read, and by the name of each source that was read.
        """
        num_bytes = [tokens / rate for tokens, rate in zip(tokens_per_source, self.tokens_per_byte, strict=True)]
        by_source = {
            name: nats / math.log(2) / size
            for name, nats, size in zip(self.source_names, nats_per_source, num_bytes, strict=True)
            if size
        }
        return sum(nats_per_source) / math.log(2) / sum(num_bytes), by_source


def shard_name(split: Split) -> str:
    """File name of a split's stream."""
    return f"{split}.bin"


def flags_name(split: Split) -> str:
    """File name of the flags of a split's tokens."""
    return f"{split}.flags.bin"


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest little-endian type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stamp_file(path: Path) -> FileStamp:
    """Describe a file as it is now, by its own name."""
    status = path.stat()
    return FileStamp(path.name, status.st_size, status.st_mtime_ns, file_sha256(path))


def is_unchanged(path: Path, stamp: FileStamp) -> bool:
    """Whether a file is the one that was stamped. It is read only if its time has changed, as by a copy or a touch."""
    status = path.stat()
    if status.st_size != stamp.num_bytes:
        return False
    return status.st_mtime_ns == stamp.mtime_ns or file_sha256(path) == stamp.sha256


def _map_shard(
    folder: Path,
    meta: DatasetMeta,
    split: Split,
    dtype: np.dtype[Any],
    file_name: Callable[[Split], str] = shard_name,
) -> npt.NDArray[Any]:
    path = folder / file_name(split)
    num_tokens = sum(getattr(source, split).num_tokens for source in meta.sources)
    stamp = next((shard for shard in meta.shards if shard.name == path.name), None)
    if stamp is None or stamp.num_bytes != num_tokens * dtype.itemsize:
        raise DataDamaged(f"{folder / META_FILE} is damaged: it does not describe {path.name}; {REBUILD}")
    if not path.is_file() or not is_unchanged(path, stamp):
        raise DataDamaged(f"{path} is missing or is not the file that was written there; {REBUILD}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))
