"""`trimtab export RUN DIR`: an imported run becomes a directory that transformers loads, or PEFT its adapters."""

import secrets
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from dispatch.errors import InvalidValue
from runtime.runs.hf_files import copy_back, kept_file, read_dtypes
from runtime.runs.run_dir import CONFIG_FILE, HF_FOLDER
from runtime.runs.run_inputs import find_checkpoint
from runtime.settings.config import check_same_model
from runtime.settings.config_file import config_from_yaml_file
from workers.checkpoints.tensor_reader import TensorReader
from workers.model.families import Settings, family_of
from workers.model.hugging_face.adapters import MergedReader, write_adapter
from workers.model.hugging_face.source import CONFIG, read_json
from workers.model.hugging_face.writing import moved_biases, write_weights


def export_model(
    run_dir: Path, folder: Path, *, step: int | None, merged: bool, drop_bias: bool, max_file_bytes: int
) -> int:
    """Write a checkpoint as config.json, tokenizer and safetensors files. The directory appears when it is complete.

    A run with adapters is written as an adapter of PEFT: adapter_config.json and one file of weights.

    step: of the checkpoint, None for the newest. merged: write the whole model, adapters added to its weights.
    drop_bias: leave out a selection bias that the family does not have.

    Raises:
        InvalidValue: the directory exists, the run was not imported, or its bias has moved and would be lost.
        CheckpointCorrupt: the checkpoint is damaged.
    """
    if folder.exists():
        raise InvalidValue(f"{folder} exists already; choose another name, or remove it")
    if not (run_dir / HF_FOLDER / CONFIG).is_file():
        raise InvalidValue(
            f"{run_dir} was not imported: the model of its configuration is not of a family that transformers knows; "
            "runs that `trimtab import` made can be exported"
        )
    settings = Settings(read_json(run_dir / HF_FOLDER / CONFIG), str(run_dir / HF_FOLDER / CONFIG))
    family = family_of(settings)
    config = config_from_yaml_file(run_dir / CONFIG_FILE).model
    # config.json may speak of a MTP layer that the files did not bring.
    of_files = replace(family.read_config(settings), num_mtp_layers=config.num_mtp_layers)
    check_same_model(config, of_files, settings.where)
    if merged and not config.lora.rank:
        raise InvalidValue(f"{run_dir} has no adapters to merge (model.lora.rank 0); leave out --merged")
    path = find_checkpoint(run_dir, step)
    reader = MergedReader(path, config.lora) if merged else TensorReader(path)
    if config.lora.rank and not merged and reader.manifest.extra.get("imported"):
        raise InvalidValue(f"{path} has no adapters yet: its run has not been trained; train it first")
    if not family.has_bias and not drop_bias and (moved := moved_biases(reader)):
        raise InvalidValue(
            f"{len(moved)} routers of {run_dir} have a selection bias, the first is {moved[0]}, and "
            f"{family.architecture} has none: without it tokens go to other experts than in training. Train with "
            "--balance.law none, or give --drop-bias to export all the same"
        )
    # A name of its own: another export to the same name must not write into it, nor remove it.
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
    partial.mkdir(parents=True)
    try:
        if config.lora.rank and not merged:
            write_adapter(partial, family, config, reader)
        else:
            dtypes = read_dtypes(run_dir)
            parts = [part for part in family.parts(config) if part.file_name in dtypes or not part.is_copy]
            write_weights(partial, parts, dtypes, reader, max_file_bytes, kept_file(run_dir))
            copy_back(run_dir, partial)
        partial.rename(folder)
    except BaseException:  # Ctrl-C as well
        shutil.rmtree(partial, ignore_errors=True)
        raise
    what = f"adapter of {family.architecture}" if config.lora.rank and not merged else family.architecture
    sys.stdout.write(f"{folder}: {what}, step {reader.manifest.step} of {run_dir}\n")
    return 0
