"""Keeps the keys and values of the tokens read so far, so that a new token costs one position, not a whole sequence."""

import torch
from torch import Tensor, nn

from workers.model.attention.mask import causal_mask

# cuDNN, which torch prefers for bf16 on Hopper, builds a plan for every new number of keys: rounded up, one plan serves
# 64 tokens. A CPU has no such plans, and would only compute the masked slots for nothing.
CUDA_WIDTH_STEP = 64


class KeyValueCache:
    """What the attention layers of a model, of any kind, keep of B sequences: one slot for each position.

    A layer keeps tensors (B, capacity, ...): rotated keys and values, or the latent and the shared key of latent
    attention. They are made at the first token, in its dtype and on its device. A sequence fills its slots from 0 on
    and in order, so that all slots at or before a position hold real tokens. Padding stands after the tokens of its
    sequence, in slots that later tokens overwrite. Only without gradients: slots are written in place.

    width_step: the number of slots that a forward attends to is rounded up to a multiple of it, if the capacity allows;
    a mask hides the slots after a token. By default 64 on CUDA and 1 elsewhere.
    """

    def __init__(self, capacity: int, width_step: int | None = None) -> None:
        self.capacity, self._width_step = capacity, width_step
        self._tensors: dict[nn.Module, tuple[Tensor, ...]] = {}
        self._rows = self._slots = torch.zeros(0, 0, dtype=torch.int64)
        self._width = 0

    def begin(self, positions: Tensor) -> Tensor:
        """Set the positions of the next forward's tokens. Returns their attention mask, as `causal_mask` does.

        positions: int64 (B, S), of each token in its sequence. Waits for the device once. Raises ValueError for a
        position beyond the capacity.
        """
        width = int(positions.max()) + 1 if positions.numel() else 1
        if width > self.capacity:
            raise ValueError(f"position {width - 1} is beyond the {self.capacity} slots of the cache; make it larger")
        step = self._width_step or (CUDA_WIDTH_STEP if positions.is_cuda else 1)
        width = min(self.capacity, -(-width // step) * step)
        self._rows, self._slots = torch.arange(len(positions), device=positions.device).unsqueeze(1), positions
        self._width = width
        key_positions = torch.arange(width, device=positions.device).expand(len(positions), width)
        return causal_mask(positions, key_positions, torch.ones_like(key_positions, dtype=torch.bool))

    def update(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Write a layer's tensors (B, S, ...) of this forward's tokens; return views of K slots, (B, K, ...).

        K is the number of slots filled so far, rounded up by width_step.
        """
        if layer not in self._tensors:
            self._tensors[layer] = tuple(each.new_zeros(len(each), self.capacity, *each.shape[2:]) for each in new)
        for kept, each in zip(self._tensors[layer], new, strict=True):
            kept[self._rows, self._slots] = each
        return tuple(kept[:, : self._width] for kept in self._tensors[layer])

    def keep_rows(self, rows: list[int]) -> None:
        """Keep the sequences in these rows, in this order, and drop all others."""
        self._tensors = {layer: tuple(kept[rows] for kept in tensors) for layer, tensors in self._tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache in all layers."""
        return sum(kept.nbytes for tensors in self._tensors.values() for kept in tensors)
