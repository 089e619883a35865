"""What attention keeps of the tokens that it has seen, so that a new token costs one step and not a whole sequence."""

import torch
from torch import Tensor, nn

from workers.attention.mask import visible


class KeyValueCache:
    """What every attention layer of a model keeps of B sequences, whatever its kind: one place for each position.

    A layer keeps tensors (B, capacity, ...): rotated keys and values, or the latent and the shared key of latent
    attention. They are made at the first token, in its dtype and on its device. A sequence fills its places from 0 on
    and in order, so that all places at or before a position hold real tokens. Padding stands after the tokens of its
    sequence, in places that later tokens overwrite. Only without gradients: places are written in place.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: dict[nn.Module, tuple[Tensor, ...]] = {}
        self._rows = self._places = torch.zeros(0, 0, dtype=torch.int64)
        self._width = 0

    def begin(self, positions: Tensor) -> Tensor:
        """Say where the tokens of the next forward stand, int64 (B, S); returns what they see, as by `visible`.

        Waits for the device once. Raises ValueError for a position that the cache has no place for.
        """
        width = int(positions.max()) + 1 if positions.numel() else 1
        if width > self.capacity:
            raise ValueError(f"position {width - 1} is beyond the {self.capacity} places of the cache; make it larger")
        self._rows, self._places = torch.arange(len(positions), device=positions.device).unsqueeze(1), positions
        self._width = width
        key_positions = torch.arange(width, device=positions.device).expand(len(positions), width)
        return visible(positions, key_positions, torch.ones_like(key_positions, dtype=torch.bool))

    def put(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep tensors (B, S, ...) of the tokens of this forward; returns those of all tokens so far (B, places, ...).

        What it returns are views.
        """
        if layer not in self._kept:
            self._kept[layer] = tuple(each.new_zeros(len(each), self.capacity, *each.shape[2:]) for each in new)
        for kept, each in zip(self._kept[layer], new, strict=True):
            kept[self._rows, self._places] = each
        return tuple(kept[:, : self._width] for kept in self._kept[layer])

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences only."""
        self._kept = {layer: tuple(kept[rows] for kept in tensors) for layer, tensors in self._kept.items()}

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return sum(kept.nbytes for tensors in self._kept.values() for kept in tensors)
