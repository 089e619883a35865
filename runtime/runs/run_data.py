"""Keeps with a run what identifies its text (names, sizes, digest) and a copy of its tokenizer and chat template."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatch.errors import InvalidValue
from runtime.runs.run_dir import DATA_FILE
from workers.data.chat import TEMPLATE_FILE
from workers.data.prepare import Progress, prepare_dataset, reopen_dataset
from workers.data.shards import Dataset
from workers.data.text import DataConfig
from workers.data.tokenizer import END_FILES, SETTINGS_FILE
from workers.record.atomic_file import write_atomically

TOKENIZER_FOLDER = "tokenizer"
IMPORTED_FOLDER = "hf"  # the run of an import has its tokenizer there (runtime/runs/hf_files.py)


def at_home(data: DataConfig, run_dir: Path) -> DataConfig:
    """The settings with the run's own copies of the tokenizer and the chat template, where it has them."""
    return replace(
        data,
        tokenizer=_copy_of(data.tokenizer, run_dir) or data.tokenizer,
        chat_template=_copy_of(data.chat_template, run_dir) or data.chat_template,
    )


def keep_data(run_dir: Path, data: DataConfig, dataset: Dataset) -> DataConfig:
    """Describe the text of a run that starts, and copy its tokenizer; returns the settings with the copies."""
    folder = run_dir / TOKENIZER_FOLDER
    for file in list(_files_to_keep(data, run_dir)):
        folder.mkdir(exist_ok=True)
        write_atomically(folder / file.name, file.read_bytes())
    meta = dataset.meta
    sources = [
        {
            "name": source.name,
            "root": source.root,
            "num_files": len(source.files),
            "num_train_tokens": source.train.num_tokens,
            "num_val_tokens": source.val.num_tokens,
        }
        for source in meta.sources
    ]
    description = {"digest": dataset.digest, "tokenizer": meta.tokenizer, "vocab_size": meta.vocab_size}
    write_atomically(run_dir / DATA_FILE, json.dumps({**description, "sources": sources}, indent=1) + "\n")
    return at_home(data, run_dir)


def knows_its_text(run_dir: Path) -> bool:
    """Whether the run describes its text by content; runs of earlier versions do not."""
    return (run_dir / DATA_FILE).exists()


def open_run_data(run_dir: Path, data: DataConfig, progress: Progress | None = None) -> Dataset:
    """Open the prepared text of a run that has begun: the same by content, or by path if it is not described."""
    digest = _read_digest(run_dir / DATA_FILE)
    return prepare_dataset(data, progress) if digest is None else reopen_dataset(data, digest, progress)


def _read_digest(path: Path) -> str | None:
    try:
        description: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidValue(f"{path} cannot be read ({error}); restore it from a copy, or remove it") from error
    digest = description.get("digest") if isinstance(description, dict) else None
    if not isinstance(digest, str):
        raise InvalidValue(f"{path} names no digest of the text; restore it from a copy, or remove it")
    return digest


def _copy_of(name: str | None, run_dir: Path) -> str | None:
    if name is None:
        return None
    copies = (run_dir.absolute() / folder / Path(name).name for folder in (TOKENIZER_FOLDER, IMPORTED_FOLDER))
    return next((str(copy) for copy in copies if copy.is_file()), None)


def _files_to_keep(data: DataConfig, run_dir: Path) -> Iterator[Path]:
    """The files that decide how text becomes tokens, as far as the run does not have them yet."""
    if data.tokenizer and _copy_of(data.tokenizer, run_dir) is None:
        tokenizer = Path(data.tokenizer).expanduser()
        yield tokenizer
        beside = (tokenizer.with_name(name) for name in (SETTINGS_FILE, TEMPLATE_FILE, *END_FILES))
        yield from (file for file in beside if file.is_file())
    if data.chat_template and _copy_of(data.chat_template, run_dir) is None:
        yield Path(data.chat_template).expanduser()
