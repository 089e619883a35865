"""Turns the text of a run into the token files that `shards` reads: once, also if several processes ask for it."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dispatch.errors import InvalidValue
from workers.data.chat import ChatTemplate, load_template
from workers.data.encoding import DocumentEncoder
from workers.data.shards import (
    FORMAT,
    META_FILE,
    REBUILD,
    SPLITS,
    DataDamaged,
    Dataset,
    DatasetMeta,
    FileStamp,
    SourceMeta,
    SplitSize,
    flags_name,
    is_unchanged,
    shard_name,
    stamp_file,
    token_dtype,
)
from workers.data.text import DataConfig, Document, TextMissing, TextSource, find_sources, split_documents
from workers.data.tokenizer import Tokenizer, load_tokenizer

SPARE_BYTES = 1 << 20  # free space beside the tokens, for meta.json among others

# Called with the bytes read so far and the bytes to read.
Progress = Callable[[int, int], None]


class DataChanged(InvalidValue):
    """The text is not the text that the prepared tokens were made from."""


def prepare_dataset(config: DataConfig, progress: Progress | None = None) -> Dataset:
    """Open the tokens of the configured text; make them first where they are not there yet.

    The held-out documents do not depend on the run's seed, so that runs can be compared. A second process that wants
    the same tokens waits for the first one, and opens what that has made.

    Args:
        progress: called during long work, at least once for each file.
    Raises:
        DataChanged: a file was added, removed or changed since the tokens were made.
        DataDamaged: the prepared files are not those that were written.
        InvalidValue: text or tokenizer are missing or unusable, or the disk is full or not writable.
    """
    cache_dir = Path(config.cache_dir).expanduser().resolve()
    try:
        sources = find_sources(config)
        tokenizer = load_tokenizer(config.tokenizer)
        template = load_template(config.chat_template, config.tokenizer) if config.format == "chat" else None
        folder = cache_dir / f"data-{_cache_key(config, sources, tokenizer, template)}"
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if config.rebuild or not folder.exists():
                encoder = DocumentEncoder(tokenizer, template)
                _build(folder, config, sources, encoder, progress or (lambda _done, _total: None))
            dataset = Dataset.open(folder)
        _refuse_changed_sources(dataset, sources)
    except OSError as error:
        way_out = "see that the text can be read, and that data.cache_dir can be written and has space"
        raise InvalidValue(f"the text could not be prepared under {cache_dir}: {error}; {way_out}") from error
    return dataset


def reopen_dataset(config: DataConfig, digest: str, progress: Progress | None = None) -> Dataset:
    """Open the tokens that a run has read before, known by their digest. Its text may have moved since, or be gone.

    Prepared tokens of that digest are enough, unless the configured text exists and gives other tokens.

    Raises:
        DataChanged: the text gives other tokens.
        TextMissing: neither the text nor tokens of that digest are there.
        InvalidValue: as of `prepare_dataset`.
    """
    cache_dir = Path(config.cache_dir).expanduser().resolve()
    prepared = None if config.rebuild else _find_prepared(cache_dir, digest)
    try:
        if prepared is not None and _is_made_from(prepared, find_sources(config)):
            return prepared
        dataset = prepare_dataset(config, progress)
    except TextMissing as error:
        if prepared is not None:
            return prepared
        raise TextMissing(
            f"{error.args[0].partition(';')[0]}, and no folder in {cache_dir} holds the tokens of the run (digest "
            f"{digest[:12]}); give the text's place by --data.path, or that of the tokens by --data.cache_dir"
        ) from error
    if dataset.digest != digest:
        raise DataChanged(
            f"the tokens of {', '.join(source.root for source in dataset.meta.sources)} have the digest "
            f"{dataset.digest[:12]}, those of the run {digest[:12]}: this is other text than the run's; give the place "
            "of the run's text by --data.path, or start a new run"
        )
    return dataset


def _find_prepared(cache_dir: Path, digest: str) -> Dataset | None:
    """Intact prepared tokens in `cache_dir` with this digest, from whatever text; None if there are none."""
    for path in sorted(cache_dir.glob(f"data-*/{META_FILE}")):
        try:
            if DatasetMeta.read(path.parent).digest == digest:
                return Dataset.open(path.parent)
        except (DataDamaged, OSError):  # `prepare_dataset` tells of it, if the run's text leads to this folder
            continue
    return None


def _is_made_from(dataset: Dataset, sources: tuple[TextSource, ...]) -> bool:
    """Whether the tokens were made from these sources: from files with the same names and content."""
    if len(sources) != len(dataset.meta.sources):
        return False
    try:
        _refuse_changed_sources(dataset, sources)
    except (DataChanged, OSError):  # prepare_dataset then raises an error that says what is wrong
        return False
    return True


def check_free_space(needed_bytes: int, free_bytes: int, folder: Path) -> None:
    """Raise InvalidValue if the token files need more bytes than are free."""
    if needed_bytes > free_bytes:
        numbers = f"need up to {needed_bytes / 1e6:.1f} MB under {folder}, where {free_bytes / 1e6:.1f} MB are free"
        raise InvalidValue(f"the tokens {numbers}; free some space or choose another disk with --data.cache_dir")


def _cache_key(
    config: DataConfig, sources: tuple[TextSource, ...], tokenizer: Tokenizer, template: ChatTemplate | None
) -> str:
    # The files' contents are no part of the key: text that changed under the same path must be reported, and not
    # silently be prepared anew.
    roots = [(source.name, str(source.root), source.version) for source in sources]
    parts: list[Any] = [FORMAT, tokenizer.name, config.val_fraction, config.suffixes, roots]
    if template is not None:
        parts.append(["chat", template.name])
    elif config.has_documents:
        parts.append("documents")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the kernel gives back even if this process is killed."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _refuse_changed_sources(dataset: Dataset, sources: tuple[TextSource, ...]) -> None:
    for meta, source in zip(dataset.meta.sources, sources, strict=True):
        stamps = {stamp.name: stamp for stamp in meta.files}
        for file in source.files:
            stamp = stamps.pop(file.name, None)
            if stamp is None:
                raise _changed(dataset, file.path, "is new")
            if not is_unchanged(file.path, stamp):
                raise _changed(dataset, file.path, "has changed")
        if stamps:
            raise _changed(dataset, source.root / min(stamps), "is gone")


def _changed(dataset: Dataset, path: Path, how: str) -> DataChanged:
    return DataChanged(f"{path} {how} since the tokens in {dataset.path} were made; {REBUILD}")


def _build(
    folder: Path, config: DataConfig, sources: tuple[TextSource, ...], encoder: DocumentEncoder, progress: Progress
) -> None:
    num_bytes = sum(file.num_bytes for source in sources for file in source.files)
    num_files = sum(len(source.files) for source in sources)
    # At most a token for each byte, and one to end each document; a source's only file becomes two documents.
    max_tokens = num_bytes + num_files + len(sources)
    token_bytes = token_dtype(encoder.tokenizer.vocab_size).itemsize + config.has_documents
    needed_bytes = max_tokens * token_bytes + SPARE_BYTES
    check_free_space(needed_bytes, shutil.disk_usage(folder.parent).free, folder.parent)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    partial.mkdir()
    try:
        _write(partial, config, sources, encoder, progress)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:  # also Ctrl-C: unfinished files would only take up space
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    folder: Path, config: DataConfig, sources: tuple[TextSource, ...], encoder: DocumentEncoder, progress: Progress
) -> None:
    names = [shard_name(split) for split in SPLITS]
    names += [flags_name(split) for split in SPLITS] if config.has_documents else []
    total = sum(file.num_bytes for source in sources for file in source.files)
    with ExitStack() as stack:
        streams = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        writer = _Writer(streams, encoder, lambda done: progress(done, total))
        split = split_documents(sources, config.val_fraction)
        metas = [writer.write_source(source, documents) for source, documents in zip(sources, split, strict=True)]
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
    shards = tuple(stamp_file(folder / name) for name in names)
    meta = DatasetMeta(encoder.tokenizer.name, encoder.tokenizer.vocab_size, tuple(metas), shards)
    (folder / META_FILE).write_text(meta.to_json())


class _Writer:
    """Appends documents to the files of their splits. streams: the open files by name, with or without flags."""

    def __init__(
        self, streams: Mapping[str, BinaryIO], encoder: DocumentEncoder, report: Callable[[int], None]
    ) -> None:
        self._streams = streams
        self._encoder = encoder
        self._dtype = token_dtype(encoder.tokenizer.vocab_size)
        self._report = report
        self._num_read = 0

    def write_source(self, source: TextSource, documents: Sequence[Document]) -> SourceMeta:
        totals = {split: SplitSize(0, 0) for split in SPLITS}
        hashes = {file.name: hashlib.sha256() for file in source.files}
        for document in documents:
            size = self._write_document(document, hashes[document.file.name].update)
            total = totals[document.split]
            totals[document.split] = SplitSize(
                total.num_tokens + size.num_tokens, total.num_text_bytes + size.num_text_bytes
            )
        for split, total in totals.items():
            if not total.num_tokens:
                raise InvalidValue(f"{source.root} holds nothing for the split {split!r}, only empty lines; give more")
        files = tuple(
            FileStamp(file.name, file.num_bytes, file.mtime_ns, hashes[file.name].hexdigest()) for file in source.files
        )
        num_copies = len({document.file.name for document in documents if document.is_copy})
        return SourceMeta(source.name, str(source.root), **totals, files=files, num_copies=num_copies)

    def _write_document(self, document: Document, hash_piece: Callable[[bytes], None]) -> SplitSize:
        tokens, flags = self._streams[shard_name(document.split)], self._streams.get(flags_name(document.split))
        num_tokens = num_text_bytes = 0
        for piece in self._encoder.encode(document, hash_piece):
            tokens.write(piece.ids.astype(self._dtype).data)
            if flags is not None:
                flags.write(piece.flags.data)
            num_tokens += len(piece.ids)
            num_text_bytes += piece.num_text_bytes
            self._num_read += piece.num_read
            self._report(self._num_read)
        return SplitSize(num_tokens, num_text_bytes)
