"""Examines a directory of Hugging Face: what `trimtab import` checks, and then every tensor."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from runtime.commands.doctor.checkpoint.findings import BIAS, CheckpointReport, Damage, TensorChecker, TensorPlace
from workers.model.hugging_face.source import ModelDirectory, SourceError, StoredTensor, open_source


def examine_hub_directory(folder: Path, progress: Callable[[str, float, float], None]) -> CheckpointReport:
    """Examine a directory. The first tensor of a wrong name, shape or dtype ends it: then no values are read."""
    try:
        source = open_source(folder)
    except SourceError as error:
        return CheckpointReport(str(folder), {"tensors": "not examined"}, [_structural(folder, error)])
    checker, biases = TensorChecker(), dict[TensorPlace, Tensor]()
    targets = {part.name: part.target for part in source.parts()}
    total = sum(stored.num_bytes for stored in source.tensors.values())
    for stored, tensor in _tensors(source):
        progress("tensors", checker.num_bytes, total)
        place, target = TensorPlace(stored.file.name, stored.name), targets.get(stored.name, "")
        checker.check(tensor, place)
        _check_digest(tensor, stored, place, checker)
        if ".experts." in target and not target.endswith("_bias"):  # biases of a young model may all be zero
            checker.check_expert(tensor, place)
        if target.endswith(BIAS):
            biases[place] = tensor
    _check_biases(biases, checker)
    return CheckpointReport(str(folder), _facts(source, checker, targets), checker.found)


def _structural(folder: Path, error: SourceError) -> Damage:
    """A finding from an error of `open_source`: its message begins with a path in `folder` and often names a tensor."""
    where, colon, rest = str(error).removeprefix(f"{folder}/").partition(": ")
    if not colon or " " in where:
        file, _, problem = str(error).removeprefix(f"{folder}/").partition(" ")
        return Damage(file=file, problem=problem)
    tensor, _, problem = rest.partition(" ")
    return Damage(file=where, tensor=tensor, problem=problem)


def _tensors(source: ModelDirectory) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Each tensor with its place, file by file, in the order of the bytes; one is held at a time."""
    for stored in sorted(source.tensors.values(), key=lambda stored: (stored.file, stored.start)):
        yield stored, stored.read()


def _check_digest(tensor: Tensor, stored: StoredTensor, place: TensorPlace, checker: TensorChecker) -> None:
    if stored.sha256 is None:
        return
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        checker.damage(place, "is not what was exported (its sha256 differs)")


def _check_biases(biases: dict[TensorPlace, Tensor], checker: TensorChecker) -> None:
    """Check biases. The files do not say whether the model was trained, but a training moves those of all layers.

    In bf16 a bias is only a warning: transformers writes it so for a model that was made in bf16.
    """
    moved = any(bool(bias.any()) for bias in biases.values())
    checker.check_biases(biases, moved=moved, centred=False, narrow="warning")
    if biases and not moved:
        first = next(iter(biases))
        checker.damage(first, "is zero, as in all layers: the model is untrained, or its biases were lost", "warning")


def _facts(source: ModelDirectory, checker: TensorChecker, targets: dict[str, str]) -> dict[str, str]:
    experts = [target for target in targets.values() if ".experts." in target]
    return {
        "family": source.family.architecture,
        "files": str(len({stored.file for stored in source.tensors.values()})),
        **checker.facts(experts),
    }
