"""Keys and values of the tokens read so far, so that a new token costs one position and not a whole sequence."""

import torch
from torch import Tensor, nn

from workers.model.attention.mask import visible

# cuDNN, which torch prefers for bf16 on Hopper, builds a plan for every new number of keys: a plan should serve more
# than one token. A CPU has no such plans, and would compute the hidden places for nothing.
CUDA_WIDTH_STEP = 64


class KeyValueCache:
    """What every attention layer of a model keeps of B sequences, whatever its kind: one place for each position.

    A layer keeps tensors (B, capacity, ...): rotated keys and values, or the latent and the shared key of latent
    attention. They are made at the first token, in its dtype and on its device. A sequence fills its places from 0 on
    and in order, so that all places at or before a position hold real tokens. Padding stands after the tokens of its
    sequence, in places that later tokens overwrite. Only without gradients: places are written in place.

    width_step: a forward sees a multiple of so many places, as far as there are; those after a token are hidden from
    it. By default 64 on CUDA and 1 elsewhere.
    """

    def __init__(self, capacity: int, width_step: int | None = None) -> None:
        self.capacity, self._width_step = capacity, width_step
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
        step = self._width_step or (CUDA_WIDTH_STEP if positions.is_cuda else 1)
        width = min(self.capacity, -(-width // step) * step)
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
        """Drop all other sequences."""
        self._kept = {layer: tuple(kept[rows] for kept in tensors) for layer, tensors in self._kept.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache in all layers."""
        return sum(kept.nbytes for tensors in self._kept.values() for kept in tensors)
