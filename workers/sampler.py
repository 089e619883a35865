"""Which tokens each rank reads at each step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.shards import Dataset, TokenArray

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ValBatch:
    """Held-out sequences of one rank. Padding repeats a real sequence, so that every rank makes as many batches."""

    input_ids: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64
    source_B: Tensor  # (B,) int64, index into `Dataset.source_names`
    is_real_B: Tensor  # (B,) bool, False for padding: neither its loss nor its tokens count


class Sampler:
    """Draws batches as a function of the seed and the step: it has no state, so a resumed run needs none.

    The training stream is cut into windows whose targets do not overlap: each window's last target is the first
    input of the next. An epoch visits every window once, in an order that depends on the seed and the epoch alone.
    """

    def __init__(self, dataset: Dataset, seq_len: int, global_batch_size: int, seed: int) -> None:
        if seq_len < 1 or global_batch_size < 1:
            raise ValueError(f"seq_len ({seq_len}) and global_batch_size ({global_batch_size}) must be at least 1")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed ({seed}) must be at least 0 and below 2**63")
        self._train, self._val = dataset.train, dataset.val
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._seed = seed
        self.num_windows = _count_windows(dataset.train, seq_len, "the training text")
        self._num_val_windows = [
            _count_windows(stream, seq_len, f"the held-out text of source {name!r}")
            for stream, name in zip(dataset.val, dataset.source_names, strict=True)
        ]
        self._order = (-1, np.empty(0, dtype=np.int64))  # the epoch that was drawn from last, and its windows

    def batch(self, step: int, rank: int, world_size: int, micro: int = 0, num_micro: int = 1) -> tuple[Tensor, Tensor]:
        """Draw the sequences of one micro-batch of one rank.

        The global batch of a step is the same for every `world_size` and `num_micro`; in the order of (rank, micro)
        they divide it. Steps count from 0.

        Returns:
            input_ids and targets, (B, S) int64, B = global_batch_size / (world_size * num_micro).
        Raises:
            ValueError: the global batch cannot be divided so.
        """
        num_parts = world_size * num_micro
        if self._global_batch_size % num_parts:
            raise ValueError(
                f"global_batch_size ({self._global_batch_size}) must be a multiple of world_size x number of "
                f"micro-batches ({world_size} x {num_micro})"
            )
        if not (step >= 0 and 0 <= rank < world_size and 0 <= micro < num_micro):
            place = f"rank {rank} of {world_size}, micro-batch {micro} of {num_micro}"
            raise ValueError(f"there is no batch for step {step}, {place}; each counts from 0")
        size = self._global_batch_size // num_parts
        first = step * self._global_batch_size + (rank * num_micro + micro) * size
        windows = [self._window(sequence) for sequence in range(first, first + size)]
        return _to_tensors(np.stack([self._read(self._train, window) for window in windows]))

    def val_batches(
        self, rank: int, world_size: int, batch_size: int, max_sequences: int | None = None
    ) -> Iterator[ValBatch]:
        """Yield this rank's share of the held-out sequences; every rank makes the same number of batches of one size.

        Which sequences are read does not depend on `world_size`. Sources take part in proportion to their length,
        each with one sequence at least.

        Args:
            max_sequences: read about so many over all ranks, evenly spaced; none: all there are.
        """
        chosen = self._choose_val(max_sequences)
        share = -(-len(chosen) // world_size)
        mine = chosen[rank * share : (rank + 1) * share]
        num_batches = -(-share // batch_size)
        padded = mine + [chosen[0]] * (num_batches * batch_size - len(mine))
        for start in range(0, len(padded), batch_size):
            part = padded[start : start + batch_size]
            tokens = np.stack([self._read(self._val[source], window) for source, window in part])
            input_ids, targets = _to_tensors(tokens)
            is_real_B = torch.arange(start, start + batch_size) < len(mine)
            yield ValBatch(input_ids, targets, torch.tensor([source for source, _ in part]), is_real_B)

    def _window(self, sequence: int) -> int:
        """The window that the run's `sequence`-th sequence reads."""
        epoch, position = divmod(sequence, self.num_windows)
        if self._order[0] != epoch:
            self._order = (epoch, _permutation(self.num_windows, self._seed, epoch))
        return int(self._order[1][position])

    def _choose_val(self, max_sequences: int | None) -> list[tuple[int, int]]:
        """(source, window) of the held-out sequences to read."""
        total = sum(self._num_val_windows)
        wanted = total if max_sequences is None else min(max_sequences, total)
        spare = max(0, wanted - len(self._num_val_windows))
        chosen = []
        for source, num_windows in enumerate(self._num_val_windows):
            num_chosen = num_windows if wanted == total else min(num_windows, 1 + spare * num_windows // total)
            chosen += [(source, index * num_windows // num_chosen) for index in range(num_chosen)]
        return chosen

    def _read(self, stream: TokenArray, window: int) -> IndexArray:
        start = window * self._seq_len
        return stream[start : start + self._seq_len + 1].astype(np.int64)


def _permutation(size: int, seed: int, epoch: int) -> IndexArray:
    # By sorting raw Philox numbers, a stream that numpy promises to keep: what Generator.permutation gives may change
    # with numpy's version, and with it the data of a resumed run.
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(keys, kind="stable")


def _count_windows(stream: TokenArray, seq_len: int, what: str) -> int:
    num_windows = (len(stream) - 1) // seq_len
    if num_windows < 1:
        raise ValueError(
            f"{what} has {len(stream)} tokens, but one sequence needs {seq_len + 1}; "
            "give more text, hold out another share (--data.val_fraction) or use shorter sequences"
        )
    return num_windows


def _to_tensors(tokens: IndexArray) -> tuple[Tensor, Tensor]:
    """(B, S + 1) tokens to inputs and targets, (B, S) each."""
    tensor = torch.from_numpy(tokens)
    return tensor[:, :-1].contiguous(), tensor[:, 1:].contiguous()
