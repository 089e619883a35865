"""Whether two checkpoints say the same, tensor by tensor."""

from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoints.checkpoint import verify
from workers.checkpoints.dcp import read_tensors
from workers.checkpoints.index import read_index


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All of them. `checkpoint.load` leaves random states to as many ranks as saved them."""
    index = read_index(path, verify(path).files)
    tensors = {
        name: torch.zeros(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
    }
    read_tensors(path, index, tensors)
    return tensors


def differing(path: Path, expected_path: Path) -> list[str]:
    """Names of tensors that are not in both, bit for bit; and what else of the two manifests differs."""
    tensors, expected = tensors_of(path), tensors_of(expected_path)
    names = sorted(
        name
        for name in tensors.keys() | expected.keys()
        if name not in tensors or name not in expected or not torch.equal(tensors[name], expected[name])
    )
    manifest, other = verify(path), verify(expected_path)
    return names + [name for name in ("step", "world_size", "extra") if getattr(manifest, name) != getattr(other, name)]
