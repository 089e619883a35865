"""What `trimtab plan` plans: settings of any source under the options of the command line."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from dispatch.errors import InvalidValue
from dispatch.exchange.placement import ExpertPlacement
from runtime.runs.run_dir import CONFIG_FILE, find_run
from runtime.settings.config import TrainConfig, check_context, check_pipeline
from runtime.settings.config_file import config_from_yaml_file, is_preset, load_config, preset_like
from workers.model.families import Settings, family_of
from workers.model.hugging_face.source import CONFIG as HUGGING_FACE_CONFIG
from workers.model.hugging_face.source import read_json
from workers.run_config import RunConfig

LONGEST_ASSUMED = 4096  # tokens: what a model allows is often far more than what it was trained on
RANKS_OF_A_NODE = 8


@dataclass(frozen=True)
class Subject:
    """Settings whose parts fit together, for `config.cluster.num_workers` ranks, and notes on what was assumed."""

    name: str
    config: TrainConfig
    ranks_per_node: int
    notes: tuple[str, ...]


def read_subject(given: argparse.Namespace) -> Subject:
    """The settings that the options of `trimtab plan` ask for.

    Raises:
        InvalidValue: CONFIG cannot be read, or the options do not fit together.
    """
    if (file := hugging_face_file(given.config)) is not None:
        config, notes = _from_hugging_face(file, given)
    else:
        config, notes = _from_trimtab(given.config), []
    config = _with_options(config, given)
    ranks_per_node = given.ranks_per_node or config.parallel.ranks_per_node
    if not ranks_per_node:
        ranks_per_node = min(RANKS_OF_A_NODE, config.cluster.num_workers)
        notes.append(f"{ranks_per_node} ranks a node are assumed; --ranks-per-node says otherwise")
    _check(config, ranks_per_node)
    return Subject(given.config, config, ranks_per_node, tuple(notes))


def hugging_face_file(name: str) -> Path | None:
    """The config.json that CONFIG names; None where it is one of Trimtab's own."""
    path = Path(name).expanduser()
    file = path / HUGGING_FACE_CONFIG if (path / HUGGING_FACE_CONFIG).is_file() else path
    return file if file.suffix == ".json" else None


def _from_trimtab(name: str) -> TrainConfig:
    """Settings of a file or preset, or of a run where neither has that name."""
    if is_preset(name) or Path(name).expanduser().is_file():
        return load_config(name)
    try:
        run_dir = find_run(name)
    except InvalidValue:
        near = preset_like(name)
        way_out = (
            f"did you mean {near}?"
            if near
            else (
                "give a YAML file or preset of Trimtab, a run's directory or name, or a Hugging Face "
                f"{HUGGING_FACE_CONFIG} or its directory"
            )
        )
        raise InvalidValue(f"{name!r:.60} is neither a preset, nor a file, nor a run; {way_out}") from None
    return config_from_yaml_file(run_dir / CONFIG_FILE)


def _from_hugging_face(file: Path, given: argparse.Namespace) -> tuple[TrainConfig, list[str]]:
    values, world_size = read_json(file), given.world
    if world_size is None:
        raise InvalidValue(f"{file} does not say how many ranks there are; give --world N, or --fit")
    settings = Settings(values, str(file))
    model = family_of(settings).read_config(settings)
    notes = []
    if model.num_mtp_layers and not given.mtp:
        notes.append("the layer for multi-token prediction is left out; --mtp 1 counts it")
        model = replace(model, num_mtp_layers=0)
    if model.max_seq_len > LONGEST_ASSUMED:
        notes.append(
            f"sequences of {LONGEST_ASSUMED} tokens are assumed, of the {model.max_seq_len} that the model allows; "
            "--seq-len says otherwise"
        )
    config = TrainConfig(
        run=RunConfig(global_batch_size=world_size, dtype="bfloat16"),
        model=replace(model, max_seq_len=min(LONGEST_ASSUMED, model.max_seq_len)),
        cluster=ClusterConfig(num_workers=world_size),
    )
    return config, notes


def _with_options(config: TrainConfig, given: argparse.Namespace) -> TrainConfig:
    def over(section: Any, **values: Any) -> Any:
        return replace(section, **{name: value for name, value in values.items() if value is not None})

    return replace(
        config,
        run=over(config.run, global_batch_size=given.batch, micro_batch_size=given.micro_batch, dtype=given.dtype),
        model=over(config.model, max_seq_len=given.seq_len, recompute=given.recompute, num_mtp_layers=given.mtp),
        parallel=over(
            config.parallel,
            ep_size=given.ep,
            exchange=given.exchange,
            shard=given.shard,
            replicate=given.replicate,
            pipeline=None if given.pp is None else replace(config.parallel.pipeline, size=given.pp),
            context=given.context,
        ),
        cluster=over(config.cluster, num_workers=given.world),
        optim=over(config.optim, name=given.optimizer, offload=given.offload),
    )


def _check(config: TrainConfig, ranks_per_node: int) -> None:
    world_size = config.cluster.num_workers
    ep_size = config.parallel.resolve(world_size)
    ExpertPlacement(config.model.moe.num_experts, ep_size)  # raises where a rank would hold no expert
    check_pipeline(config)
    check_context(config)
    _ = config.num_micro_batches  # raises where ranks do not divide the batch
    if world_size % ranks_per_node:
        raise InvalidValue(
            f"--ranks-per-node ({ranks_per_node}) must divide the number of ranks ({world_size}); nodes are alike here"
        )
    if ep_size % ranks_per_node and ranks_per_node % ep_size:
        raise InvalidValue(
            f"--ranks-per-node ({ranks_per_node}) must divide --ep ({ep_size}), or be a multiple of it, so that all "
            "expert-parallel groups lie alike on their nodes"
        )
