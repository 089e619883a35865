"""Examines a checkpoint of Trimtab: files, index, names, shapes, values, experts, biases, and the configuration."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dispatch.errors import InvalidValue
from dispatch.exchange.local import LocalDispatcher
from dispatch.laws import BalanceConfig
from runtime.commands.doctor.checkpoint.findings import BIAS, CheckpointReport, Damage, TensorChecker, TensorPlace
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.config import FREE_SETTINGS, TrainConfig, flatten
from runtime.settings.config_file import config_from_yaml, config_from_yaml_file
from runtime.terminal.quantities import counted
from workers.checkpoints.checkpoint_files import (
    INDEX,
    MANIFEST,
    CheckpointCorrupt,
    CheckpointError,
    Manifest,
    check_file,
    read_manifest,
)
from workers.checkpoints.index import read_index
from workers.checkpoints.shares import TensorSpec, specs_of
from workers.checkpoints.state import canonical_state, missing_experts
from workers.checkpoints.tensor_reader import TensorReader
from workers.model.decoder import Decoder
from workers.model.meta_device import meta_device
from workers.model.model_config import ModelConfig
from workers.training.optimizer import OptimConfig, build_optimizer

Progress = Callable[[str, float, float], None]  # takes what is read, bytes so far, bytes in all


def examine_checkpoint(path: Path, progress: Progress) -> CheckpointReport:
    """Examine one checkpoint folder. Reads every byte twice, and holds one tensor at a time."""
    try:
        manifest = read_manifest(path)
    except CheckpointCorrupt as error:
        return _unread(path, [Damage(file=error.file, problem=error.reason)])
    except CheckpointError as error:
        return _unread(path, [Damage(file=MANIFEST, problem=str(error))])
    if found := [*_damaged_files(path, manifest, progress), *_index_damage(path, manifest)]:
        return _unread(path, found)
    reader = TensorReader(path, manifest)
    config, law, found = _configuration(path, manifest)
    wanted = _wanted(config.model, config.optim) if config else None
    found += _misfits(reader, wanted) if wanted is not None else []
    checker = TensorChecker()
    biases = _check_tensors(reader, checker, progress)
    _check_biases(reader, biases, law, wanted, checker)
    return CheckpointReport(str(path), _facts(reader, checker), found + checker.found)


def _unread(path: Path, found: list[Damage]) -> CheckpointReport:
    return CheckpointReport(str(path), {"tensors": "not examined: what damaged files hold says nothing"}, found)


def _damaged_files(path: Path, manifest: Manifest, progress: Progress) -> Iterator[Damage]:
    """All files that are not as they were written, not only the first."""
    total, done = sum(size for size, _ in manifest.files.values()), 0
    for name, (size, sha256) in sorted(manifest.files.items()):
        progress("files", done, total)
        try:
            check_file(path, name, size, sha256)
        except CheckpointCorrupt as error:
            yield Damage(file=error.file, problem=error.reason)
        done += size


def _index_damage(path: Path, manifest: Manifest) -> list[Damage]:
    """An index that cannot be read, or experts that it does not name."""
    try:
        index = read_index(path, manifest.files)
    except CheckpointCorrupt as error:
        return [Damage(file=error.file, problem=error.reason)]
    entries: Mapping[str, Any] = index.state_dict_metadata
    gaps = missing_experts({name: tuple(entry.size) for name, entry in entries.items()})
    return [Damage(file=INDEX, tensor=gap.partition(" ")[0], problem=gap.partition(" ")[2]) for gap in gaps]


def _configuration(path: Path, manifest: Manifest) -> tuple[TrainConfig | None, BalanceConfig | None, list[Damage]]:
    """The settings of model and optimizer, the law (None without a run), and findings on the configuration."""
    run_file, told = path.parent.parent / CONFIG_FILE, manifest.extra.get("model")
    if run_file.is_file():
        try:
            config = config_from_yaml_file(run_file)
        except InvalidValue as error:
            return None, None, [Damage(file=CONFIG_FILE, problem=str(error))]
        law = None if config.freezes_router else config.balance.law_config  # no law moves the bias of a frozen router
        return config, law, _other_model(config.model, told or {})
    if told is None:
        problem = "does not tell the model, nor does a run"
        return None, None, [Damage(severity="warning", file=MANIFEST, problem=problem)]
    try:
        optim = {"name": manifest.extra.get("optimizer", OptimConfig.name)}
        return config_from_yaml(yaml.safe_dump({"model": told, "optim": optim})), None, []
    except InvalidValue as error:
        return None, None, [Damage(file=MANIFEST, problem=f"tells a model that is none: {error}")]


def _other_model(config: ModelConfig, told: Mapping[str, Any]) -> list[Damage]:
    saved, ours = _flat(told), flatten(config)
    ours = {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()}  # as in JSON
    differing = [
        f"{name} ({value!r} there, {saved[name]!r} here)"
        for name, value in ours.items()
        if name in saved and saved[name] != value and f"model.{name}" not in FREE_SETTINGS
    ]
    problem = f"tells another model than {CONFIG_FILE}: {', '.join(differing)}"
    return [Damage(file=MANIFEST, problem=problem)] if differing else []


def _misfits(reader: TensorReader, wanted: Mapping[str, TensorSpec]) -> list[Damage]:
    """Findings: tensors that are missing, that the configuration does not have, or of another shape or dtype."""
    if reader.manifest.extra.get("imported"):  # there is no optimizer yet
        wanted = {name: spec for name, spec in wanted.items() if name.startswith("model.")}
    saved = {name: TensorSpec(shape, reader.dtypes[name]) for name, shape in reader.shapes.items()}
    ours = {name for name in saved if name.startswith(("model.", "optim."))}
    found = [
        Damage(file=_file(reader, name), tensor=name, problem=f"is {saved[name]}, and by the configuration {spec}")
        for name, spec in wanted.items()
        if name in saved and saved[name] != spec
    ]
    found += [Damage(file=INDEX, tensor=name, problem="is missing") for name in sorted(wanted.keys() - ours)]
    return found + [
        Damage(file=_file(reader, name), tensor=name, problem="is not a tensor of this configuration")
        for name in sorted(ours - wanted.keys())
    ]


def _wanted(model_config: ModelConfig, optim: OptimConfig) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the whole training state, from the model on the meta device."""
    with meta_device():
        model = Decoder(model_config, lambda: LocalDispatcher(model_config.moe.num_experts))
        return specs_of(canonical_state(model, build_optimizer(model, optim), optim.entry.initial_state))


def _check_tensors(reader: TensorReader, checker: TensorChecker, progress: Progress) -> dict[str, Tensor]:
    """Read every tensor once; return those that are needed together: the biases."""
    kept: dict[str, Tensor] = {}
    sizes = {name: TensorSpec(shape, reader.dtypes[name]).num_bytes for name, shape in reader.shapes.items()}
    total = sum(sizes.values())
    for name in sorted(reader.shapes, key=reader.places.__getitem__):
        progress("tensors", checker.num_bytes, total)
        tensor, place = reader.read([name])[name], TensorPlace(_file(reader, name), name)
        checker.check(tensor, place)
        if name.startswith("model.") and ".experts." in name:
            checker.check_expert(tensor, place)
        if name == "law.bias" or (name.startswith("model.") and name.endswith(BIAS)):
            kept[name] = tensor
    return kept


def _check_biases(
    reader: TensorReader,
    biases: dict[str, Tensor],
    law: BalanceConfig | None,
    wanted: Mapping[str, TensorSpec] | None,
    checker: TensorChecker,
) -> None:
    law_bias = biases.pop("law.bias", None)
    placed = {TensorPlace(_file(reader, name), name): bias for name, bias in biases.items()}
    # Without a run the law is not known; but one that moves a layer's bias moves that of all layers.
    moved = any(bool(bias.any()) for bias in biases.values())
    if law is not None:
        moved = reader.manifest.step > 0 and law.law != "none" and law.rate != 0
    checker.check_biases(placed, moved=moved, centred=moved and law is not None and not law.entry.multiplies)
    if law_bias is None:
        return
    # The law's order is that of the model's modules, which the names of the configuration have.
    in_order = [biases[name] for name in wanted or sorted(biases, key=_layer_numbers) if name in biases]
    # The bias that routes and the bias that the law goes on from must be the same.
    if not in_order or not torch.equal(torch.cat(in_order).double(), law_bias.double()):
        problem = "is not what the routers have: a run that goes on would route by another bias"
        checker.damage(TensorPlace(_file(reader, "law.bias"), "law.bias"), problem)


def _layer_numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _file(reader: TensorReader, name: str) -> str:
    return reader.places[name][0]


def _facts(reader: TensorReader, checker: TensorChecker) -> dict[str, str]:
    manifest, experts = reader.manifest, [n for n in reader.shapes if n.startswith("model.") and ".experts." in n]
    return {
        "step": f"{manifest.step}, saved by {counted(manifest.world_size, 'rank')}",
        "files": f"{len(manifest.files)}, as they were written (size and sha256)",
        **checker.facts(experts),
    }


def _flat(told: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in told.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
