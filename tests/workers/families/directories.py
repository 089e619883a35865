"""Directories of Hugging Face as transformers writes them, with a tokenizer."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

from tests.workers.families.hugging_face import VOCAB_SIZE, make_model


def write_directory(folder: Path, name: str, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """A model of CONFIGS in `folder`, saved by transformers; save: arguments of save_pretrained."""
    make_model(name, dtype).save_pretrained(folder, **save)
    vocabulary = {"[UNK]": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
