"""The folder `hf` of an imported run: the files of a Hugging Face model beside its weights, kept for export."""

import json
import shutil
from pathlib import Path

import torch

from runtime.runs.run_dir import HF_FOLDER
from workers.model.families.stacks import stack_of
from workers.model.hugging_face.source import CONFIG, DTYPE_NAMES, INDEX, ModelDirectory, SourceError, read_json

TOKENIZER = "tokenizer.json"
DTYPES = "tensor_dtypes.json"
KEPT = "kept.safetensors"  # tensors of a part of the model that we do not train, such as a vision tower
# Files of tokenizer, chat template and generation settings. Code (*.py) is not copied: an export would pass it on to
# people who load the model and run it.
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_MAX_BYTES = 100 * 2**20  # Larger files are not settings.


def keep_files(source: ModelDirectory, run_dir: Path) -> None:
    """Copy config.json, tokenizer, generation settings and kept tensors. Write down the dtype of every other tensor."""
    folder = run_dir / HF_FOLDER
    folder.mkdir()
    for file in sorted(source.folder.iterdir()):
        if file.suffix in _SUFFIXES and file.name != INDEX and file.is_file() and file.stat().st_size < _MAX_BYTES:
            shutil.copyfile(file, folder / file.name)
    dtypes = {stack_of(name): DTYPE_NAMES[tensor.dtype] for name, tensor in source.tensors.items()}
    (folder / DTYPES).write_text(json.dumps(dtypes, indent=0) + "\n")
    if source.kept:
        from safetensors.torch import save_file

        kept = {name: tensor.read() for name, tensor in source.kept.items()}
        save_file(kept, folder / KEPT, metadata={"format": "pt"})


def kept_file(run_dir: Path) -> Path | None:
    """The file of the tensors that an export gets back unchanged; None if the whole model was imported."""
    file = run_dir / HF_FOLDER / KEPT
    return file if file.is_file() else None


def check_tokenizer(folder: Path) -> None:
    """Refuse a directory without a tokenizer that Trimtab can read. Raises SourceError."""
    if not (folder / TOKENIZER).is_file():
        raise SourceError(
            f"{folder / TOKENIZER} is missing: text would have other ids than the model knows; fetch it as well, or "
            "give another by --data.tokenizer FILE"
        )


def read_dtypes(run_dir: Path) -> dict[str, torch.dtype]:
    """The dtype in which each tensor was stored. For fp8 and MXFP4 it is bf16: their scales were not kept."""
    by_name = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {"F8_E4M3": torch.bfloat16, "U8": torch.bfloat16}
    return {name: by_name[dtype] for name, dtype in read_json(run_dir / HF_FOLDER / DTYPES).items()}


def copy_back(run_dir: Path, folder: Path) -> None:
    """Copy the kept files into an export. In config.json, quantised weights (fp8, MXFP4) are declared as bf16."""
    for file in sorted((run_dir / HF_FOLDER).iterdir()):
        if file.name not in (DTYPES, CONFIG, KEPT):
            shutil.copyfile(file, folder / file.name)
    config = read_json(run_dir / HF_FOLDER / CONFIG)
    parts = [config, *([config["text_config"]] if "text_config" in config else [])]
    quantised = [part.pop("quantization_config", None) for part in parts]
    if not any(quantised):
        shutil.copyfile(run_dir / HF_FOLDER / CONFIG, folder / CONFIG)
        return
    for part in parts:
        part["torch_dtype" if "torch_dtype" in part else "dtype"] = "bfloat16"
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
