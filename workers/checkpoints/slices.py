"""Keys of what a rank holds: the name of a tensor and, where the tensor is sharded, the rows of this rank.

    model.layers.0.attention.out_proj.weight         the whole tensor
    model.layers.0.attention.out_proj.weight[8:16]   its rows 8 to 15

Only names are in a checkpoint's index: slices become DCP's chunks of one tensor, which any other division can read.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from workers.checkpoints.shares import TensorSpec

_KEY = re.compile(r"(?P<name>.+)\[(?P<first>\d+):(?P<stop>\d+)\]")


class Slice(NamedTuple):
    """The rows `first` to `stop` - 1 of a tensor; `stop` is None for the whole tensor."""

    name: str
    first: int = 0
    stop: int | None = None

    @classmethod
    def of_key(cls, key: str) -> "Slice":
        """The slice whose `key` this is."""
        match = _KEY.fullmatch(key)
        return cls(key) if match is None else cls(match["name"], int(match["first"]), int(match["stop"]))

    @property
    def key(self) -> str:
        """The name, and for a slice its rows, as the module says."""
        return self.name if self.stop is None else f"{self.name}[{self.first}:{self.stop}]"


def whole_specs(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Shape and dtype of the whole tensors, from those of the slices that all ranks hold, by key.

    Raises:
        ValueError: slices of a tensor overlap, differ in shape or dtype, or leave rows out.
    """
    parts: dict[str, list[tuple[Slice, TensorSpec]]] = {}
    for key, spec in specs.items():
        part = Slice.of_key(key)
        parts.setdefault(part.name, []).append((part, spec))
    return {name: _join(name, sorted(slices, key=_first_row)) for name, slices in parts.items()}


def _join(name: str, parts: Iterable[tuple[Slice, TensorSpec]]) -> TensorSpec:
    (first, spec), *others = parts
    if first.stop is None and not others:
        return spec
    num_rows = 0
    for part, part_spec in [(first, spec), *others]:
        rows = (part.stop or 0) - part.first
        fits = part_spec.dtype == spec.dtype and part_spec.shape == (rows, *spec.shape[1:])
        if part.stop is None or part.first != num_rows or not fits:
            raise ValueError(f"the slices of {name} make no tensor: {part.key} is {part_spec}, after {num_rows} rows")
        num_rows = part.stop
    return TensorSpec((num_rows, *spec.shape[1:]), spec.dtype)


def _first_row(part: tuple[Slice, TensorSpec]) -> tuple[int, int]:
    return part[0].first, part[0].stop or 0
