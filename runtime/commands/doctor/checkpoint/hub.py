"""Examine a directory of Hugging Face: what import checks, and then every tensor."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from runtime.commands.doctor.checkpoint.findings import BIAS, CheckpointReport, Damage, TensorPlace, TensorWatch
from workers.model.families.source import ModelDirectory, SourceError, StoredTensor, open_source


def examine_hub_directory(folder: Path, progress: Callable[[str, float, float], None]) -> CheckpointReport:
    """Examine it. Names, shapes and dtypes are told up to the first that is wrong; then nothing is read."""
    try:
        source = open_source(folder)
    except SourceError as error:
        return CheckpointReport(str(folder), {"tensors": "not examined"}, [_structural(folder, error)])
    watch, biases = TensorWatch(), dict[TensorPlace, Tensor]()
    targets = {part.name: part.target for part in source.parts()}
    total = sum(stored.num_bytes for stored in source.tensors.values())
    for stored, tensor in _tensors(source):
        progress("tensors", watch.num_bytes, total)
        place, target = TensorPlace(stored.file.name, stored.name), targets.get(stored.name, "")
        watch.see(tensor, place)
        _check_digest(tensor, stored, place, watch)
        if ".experts." in target and not target.endswith("_bias"):  # biases of a young model may all be zero
            watch.see_expert(tensor, place)
        if target.endswith(BIAS):
            biases[place] = tensor
    _look_at_biases(biases, watch)
    return CheckpointReport(str(folder), _facts(source, watch, targets), watch.found)


def _structural(folder: Path, error: SourceError) -> Damage:
    """Import's message, which begins with a path in `folder`, and often a tensor, in our terms."""
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


def _check_digest(tensor: Tensor, stored: StoredTensor, place: TensorPlace, watch: TensorWatch) -> None:
    if stored.sha256 is None:
        return
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        watch.damage(place, "is not what was exported (its sha256 differs)")


def _look_at_biases(biases: dict[TensorPlace, Tensor], watch: TensorWatch) -> None:
    """Whether the model was trained is not told, but a training moves the biases of all layers.

    In bf16 a bias is only a warning: transformers writes it so for a model that was made in bf16.
    """
    moved = any(bool(bias.any()) for bias in biases.values())
    watch.see_biases(biases, moved=moved, centred=False, narrow="warning")
    if biases and not moved:
        first = next(iter(biases))
        watch.damage(first, "is zero, as in all layers: the model is untrained, or its biases were lost", "warning")


def _facts(source: ModelDirectory, watch: TensorWatch, targets: dict[str, str]) -> dict[str, str]:
    experts = [target for target in targets.values() if ".experts." in target]
    return {
        "family": source.family.architecture,
        "files": str(len({stored.file for stored in source.tensors.values()})),
        **watch.facts(experts),
    }
