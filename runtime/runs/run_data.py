"""Keeps, in a run's directory, a description of its text (names, sizes, digest) and copies of tokenizer and template.

With them a run can be resumed after its text or its tokenizer has been moved, and refuses a text that has changed.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatch.errors import InvalidValue
from runtime.runs.run_dir import DATA_FILE, HF_FOLDER
from workers.data.chat import TEMPLATE_FILE
from workers.data.prepare import Progress, prepare_dataset, reopen_dataset
from workers.data.shards import Dataset
from workers.data.text import DataConfig
from workers.data.tokenizer import END_FILES, SETTINGS_FILE
from workers.record.atomic_file import write_atomically

TOKENIZER_FOLDER = "tokenizer"


def with_run_copies(data: DataConfig, run_dir: Path) -> DataConfig:
    """The settings, with the paths of the run's own copies of tokenizer and chat template where it has copies."""
    return replace(
        data,
        tokenizer=_copy_of(data.tokenizer, run_dir) or data.tokenizer,
        chat_template=_copy_of(data.chat_template, run_dir) or data.chat_template,
    )


def keep_data(run_dir: Path, data: DataConfig, dataset: Dataset) -> DataConfig:
    """Write the description of a starting run's text, and copy its tokenizer. Returns the settings with the copies."""
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
    return with_run_copies(data, run_dir)


def has_text_digest(run_dir: Path) -> bool:
    """Whether the run describes its text by content; runs of earlier versions do not."""
    return (run_dir / DATA_FILE).exists()


def open_run_data(run_dir: Path, data: DataConfig, progress: Progress | None = None) -> Dataset:
    """Open the prepared text of a run that has begun, by its digest; without a description, prepare it anew."""
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
    """The run's own copy of the file that a setting names; None if there is none."""
    if name is None:
        return None
    # An imported run has its tokenizer in the folder of the import.
    copies = (run_dir.absolute() / folder / Path(name).name for folder in (TOKENIZER_FOLDER, HF_FOLDER))
    return next((str(copy) for copy in copies if copy.is_file()), None)


def _files_to_keep(data: DataConfig, run_dir: Path) -> Iterator[Path]:
    """The files that decide how text becomes tokens, without those that the run has already."""
    if data.tokenizer and _copy_of(data.tokenizer, run_dir) is None:
        tokenizer = Path(data.tokenizer).expanduser()
        yield tokenizer
        beside = (tokenizer.with_name(name) for name in (SETTINGS_FILE, TEMPLATE_FILE, *END_FILES))
        yield from (file for file in beside if file.is_file())
    if data.chat_template and _copy_of(data.chat_template, run_dir) is None:
        yield Path(data.chat_template).expanduser()
