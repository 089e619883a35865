"""`trimtab import DIR RUN`: a directory of Hugging Face becomes a run that is about to begin."""

import multiprocessing
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from dispatch.errors import InvalidValue
from runtime.job.job import as_recorded
from runtime.runs.hf_files import TOKENIZER, check_tokenizer, keep_files
from runtime.runs.run_dir import CONFIG_FILE, HF_FOLDER
from runtime.settings.cautions import cautions
from runtime.settings.config import FINE_TUNING_LR, TrainConfig, check_same_model, cross_check
from runtime.settings.config_file import BASE_PRESET, config_to_yaml, load_config, override
from workers.model.hugging_face.importing import RENDEZVOUS, ImportedShard, import_shard
from workers.model.hugging_face.source import ModelDirectory, open_source
from workers.record.run_log import RunLog

# A model may know sequences that no training step of ordinary memory can hold.
LONGEST_BY_DEFAULT = 2048


def import_model(folder: Path, run_dir: Path, arguments: Sequence[str]) -> int:
    """Make `run_dir` from a directory of Hugging Face; `arguments` are options of `trimtab train`.

    As many processes as the run has workers read a shard each. The run directory appears when it is complete.

    Raises:
        InvalidValue: a model that is not supported, settings that do not fit it, or a run directory that exists.
        SourceError: the directory is damaged; names the file and the tensor.
    """
    if run_dir.exists():
        raise InvalidValue(f"{run_dir} exists already; choose another name, or remove it")
    if not folder.is_dir():
        raise InvalidValue(f"there is no directory {folder}{_hint_of_the_hub(folder)}")
    source = open_source(folder)
    config = _configure(source, run_dir, arguments)
    # A name of its own: another import to the same name must not write into it, nor remove it.
    partial = run_dir.with_name(f".{run_dir.name}.{secrets.token_hex(8)}.partial")
    partial.mkdir(mode=0o700, parents=True)
    try:
        shards = _read_shards(source, partial, config)
        _describe(source, partial, config, shards)
        partial.rename(run_dir)
    except BaseException:  # Ctrl-C as well: nothing is half imported
        shutil.rmtree(partial, ignore_errors=True)
        raise
    largest = max(shard.shard_bytes for shard in shards)
    peak = max(shard.peak_bytes for shard in shards)
    notes = list(cautions(config, is_imported=True))
    if source.num_left_out:
        notes.append(
            f"{source.num_left_out:,} tensors of multi-token prediction are left out: {source.family.architecture} "
            "computes without them, and an export will not have them"
        )
    if source.kept:
        notes.append(
            f"{len(source.kept):,} tensors besides the language model, such as its vision tower, are kept as they are: "
            "no training changes them, and an export has them again"
        )
    sys.stdout.write(
        f"{run_dir}: {source.family.architecture}, {source.num_tensors:,} tensors; largest shard "
        f"{largest / 1e9:.2f} GB of {len(shards)}, peak memory of a process {peak / 1e9:.2f} GB\n"
        + "".join(f"note: {text}\n" for text in notes)
        + f"go on with: trimtab train --resume {run_dir}\n"
    )
    return 0


def _configure(source: ModelDirectory, run_dir: Path, arguments: Sequence[str]) -> TrainConfig:
    config = load_config(BASE_PRESET)
    longest = min(LONGEST_BY_DEFAULT, source.config.max_seq_len)
    tokenizer = str((run_dir / HF_FOLDER / TOKENIZER).absolute())
    config = replace(
        config,
        run=replace(config.run, name=run_dir.name, dir=str(run_dir.parent)),
        model=replace(source.config, max_seq_len=longest),
        data=replace(config.data, tokenizer=tokenizer),
        optim=replace(config.optim, lr=FINE_TUNING_LR),
        # A bias that the family does not have could not be exported: without being asked for it stays zero.
        balance=config.balance if source.family.has_bias else replace(config.balance, law="none"),
    )
    config = _with_batch_of_any_workers(override(config, arguments), arguments)
    if source.family.has_bias and config.balance.entry.multiplies:
        raise InvalidValue(
            f"balance.law {config.balance.law!r} multiplies scores by its bias, and that of "
            f"{source.family.architecture} is added to them; choose another law, such as sign"
        )
    check_same_model(config.model, source.config, str(source.folder))
    if config.data.tokenizer == tokenizer:
        check_tokenizer(source.folder)
        # The run directory is not there yet: the rules are checked with the file that will be copied into it.
        cross_check(replace(config, data=replace(config.data, tokenizer=str(source.folder / TOKENIZER))))
    else:
        cross_check(config)
    return config


def _hint_of_the_hub(folder: Path) -> str:
    if folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0].startswith("."):
        return "; give the folder of a model, with config.json and safetensors files"
    return (
        f"; if {folder} is a name on the Hugging Face Hub, fetch it first: hf download {folder} --local-dir "
        f"{folder.name}, then give that folder: trimtab import {folder.name} RUN"
    )


def _with_batch_of_any_workers(config: TrainConfig, arguments: Sequence[str]) -> TrainConfig:
    """Round the preset's batch up to a multiple of the workers, unless the user has chosen a batch."""
    if any(argument.startswith("--run.global_batch_size") for argument in arguments):
        return config
    num_workers = config.cluster.num_workers
    shares = -(-config.run.global_batch_size // num_workers)
    return replace(config, run=replace(config.run, global_batch_size=shares * num_workers))


def _read_shards(source: ModelDirectory, run_dir: Path, config: TrainConfig) -> list[ImportedShard]:
    world_size = config.cluster.num_workers
    if world_size == 1:
        return [import_shard(source.folder, run_dir, config.model, 0, 1)]
    # Not fork: torch has threads by now, and a forked process would inherit their locks without them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(world_size, mp_context=context, initializer=_stay_on_this_machine) as pool:
        futures = [
            pool.submit(import_shard, source.folder, run_dir, config.model, rank, world_size)
            for rank in range(world_size)
        ]
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process of the import ended without a word, which is how the system ends one that takes too much "
                f"memory; each of the {world_size} holds 1/{world_size} of the model: take more by --workers, on a "
                "machine that can hold all of them"
            ) from error


def _stay_on_this_machine() -> None:
    """Let gloo listen on loopback alone; by itself it takes the address that the host name resolves to."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback


def _describe(source: ModelDirectory, run_dir: Path, config: TrainConfig, shards: Sequence[ImportedShard]) -> None:
    (run_dir / RENDEZVOUS).unlink(missing_ok=True)
    keep_files(source, run_dir)
    (run_dir / CONFIG_FILE).write_text(config_to_yaml(as_recorded(config)))
    layout = shards[0].layout
    if config.freezes_router:  # a frozen router is not balanced
        layout = replace(layout, balanced=(False,) * len(layout.names))
    with RunLog(run_dir, layout) as log:
        log.event("imported", source=str(source.folder), architecture=source.family.architecture)
