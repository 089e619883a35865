"""Reads tensors of a checkpoint one by one, for a process that must not hold all of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint_files import Manifest
from workers.checkpoints.dcp import read_tensors
from workers.checkpoints.index import read_index


class TensorReader:
    """Reads single tensors of a checkpoint. Its files are verified when the reader is made.

    shapes, dtypes: by canonical name. places: file and offset of each tensor, for callers that read in this order.

    Args:
        path: the folder of the checkpoint.
        manifest: given where the caller has already verified all files, which are then not verified again.
    Raises:
        CheckpointCorrupt: a file is damaged, as `workers.checkpoints.checkpoint.verify` finds it.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self._path = path
        self.manifest = manifest or checkpoint.verify(path)
        self._index = read_index(path, self.manifest.files)
        entries: dict[str, Any] = self._index.state_dict_metadata
        self.shapes = {name: tuple(entry.size) for name, entry in entries.items()}
        self.dtypes: dict[str, torch.dtype] = {name: entry.properties.dtype for name, entry in entries.items()}
        stored: Mapping[Any, Any] = self._index.storage_data
        self.places = {place.fqn: (str(info.relative_path), int(info.offset)) for place, info in stored.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by canonical name, on the CPU. Raises KeyError for a name that the checkpoint does not have."""
        tensors = {name: torch.empty(self.shapes[name], dtype=self.dtypes[name]) for name in names}
        read_tensors(self._path, self._index, tensors)
        return tensors
