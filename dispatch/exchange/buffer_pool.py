"""Memory of large CPU tensors, reused instead of given back to the system. It limits nothing.

No expert has a capacity and no token is dropped: buffers have the size of the rows that come. `ScheduleConfig.max_rows`
bounds how many rows a rank holds at once.

glibc gives blocks above 32 MiB, and the free end of its heap, back to the system. The next layer then waits for fresh
zeroed pages, at 2 to 6 GiB/s on the machines measured: a tenth of a training step. On CUDA torch's caching allocator
does this already.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

_MIN_BYTES = 1 << 18  # smaller tensors come from glibc's free lists, which is as fast
# Sizes are rounded up to a multiple of this, large ones to a sixteenth of their power of two, so that the next batch,
# which has a few rows more or less, finds a block that fits.
_GRANULE = 1 << 16
_IDLE_TAKES = 512  # a block that has served none of this many requests is given back to the system


@dataclass(eq=False)
class _Block:
    storage: torch.UntypedStorage
    last_use: int


@dataclass
class BufferPool:
    """Hands out uninitialised tensors. A block is free again when only this pool refers to its storage.

    Nobody gives a tensor back: views, saved tensors and gradients count as references, and keep their block as long as
    they live. Use one pool for a model, on one thread at a time.
    """

    _blocks: list[_Block] = field(default_factory=list)
    _num_takes: int = 0

    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`torch.empty` on the device of `like`; dtype: None for that of `like`. Large CPU tensors reuse a block."""
        dtype = dtype or like.dtype
        num_bytes = dtype.itemsize * math.prod(shape)
        # Deterministic mode fills uninitialised memory with NaN, to show who reads it: only torch.empty does that.
        if like.device.type != "cpu" or num_bytes < _MIN_BYTES or torch.are_deterministic_algorithms_enabled():
            return like.new_empty(shape, dtype=dtype)
        tensor: Tensor = torch.empty(0, dtype=dtype).set_(self._take(num_bytes), 0, shape)  # type: ignore[call-overload]
        return tensor

    def zeros(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `empty`, filled with zeros."""
        return self.empty(*shape, like=like, dtype=dtype).zero_()

    def _take(self, num_bytes: int) -> torch.UntypedStorage:
        self._num_takes += 1
        self._blocks = [block for block in self._blocks if self._num_takes - block.last_use < _IDLE_TAKES]
        near = [b for b in self._blocks if 0.75 * num_bytes <= b.storage.nbytes() <= 1.25 * num_bytes and _is_free(b)]
        fitting = [block for block in near if block.storage.nbytes() >= num_bytes]
        if fitting:
            block = min(fitting, key=lambda b: b.storage.nbytes())
        else:
            # A batch may bring a few rows more than the last one: its block replaces those that are now too small.
            self._blocks = [block for block in self._blocks if block not in near]
            step = max(_GRANULE, 1 << max(0, num_bytes.bit_length() - 5))
            block = _Block(torch.UntypedStorage(-(-num_bytes // step) * step), 0)
            self._blocks.append(block)
        block.last_use = self._num_takes
        return block.storage


def _is_free(block: _Block) -> bool:
    # A storage has two counts of references. Python's: all Python references to a storage are to one object, and 2 of
    # them are the block's and the argument of getrefcount.
    if sys.getrefcount(block.storage) > 2:
        return False
    # torch's own, of tensors: 1 for the Python object. No public function returns it.
    return torch._C._storage_Use_Count(block.storage._cdata) == 1  # noqa: SLF001
