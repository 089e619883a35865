"""Which tokens each rank reads at each step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.mix import MixCounts, MixSchedule
from workers.shards import Dataset, TokenArray

IndexArray = npt.NDArray[np.int64]

_ALL_SOURCES = -1  # in the place of a source: the windows of the whole training stream


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
    With a mix every source has windows and epochs of its own, and each sequence comes from one source: a step holds as
    many of each as `workers.mix` says, in an order that depends on the seed and the step.
    """

    def __init__(
        self, dataset: Dataset, seq_len: int, global_batch_size: int, seed: int, mix: MixSchedule | None = None
    ) -> None:
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
        self._mix, self._mixed_train = self._open_mix(dataset, mix or MixSchedule())
        # By source: the epoch that was drawn from last, and its windows. Kept for speed, never needed.
        self._orders: dict[int, tuple[int, IndexArray]] = {}

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
        first = (rank * num_micro + micro) * size
        sequences = range(first, first + size)
        if self._mix is None:
            numbers = [step * self._global_batch_size + place for place in sequences]
            tokens = [self._read(self._train, self._window(number, self.num_windows)) for number in numbers]
        else:
            tokens = self._read_mixed(self._mix, step, sequences)
        return _to_tensors(np.stack(tokens))

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

    def _open_mix(self, dataset: Dataset, mix: MixSchedule) -> tuple[MixCounts | None, tuple[TokenArray, ...]]:
        """What decides how many sequences of each source a batch holds, and each source's part of the training text."""
        mix.check_sources(dataset.source_names)
        if not mix.before:
            return None, ()
        for stream, name in zip(dataset.train_by_source, dataset.source_names, strict=True):
            _count_windows(stream, self._seq_len, f"the training text of source {name!r}")
        return MixCounts(mix, self._global_batch_size), dataset.train_by_source

    def _read_mixed(self, mix: MixCounts, step: int, places: range) -> list[IndexArray]:
        """The sequences at these places of the step's batch."""
        counts, before = mix.of_step(step), mix.until(step)
        sources = np.repeat(np.arange(len(counts)), counts)  # (B,), then which of its source's sequences each one is
        numbers = np.concatenate([start + np.arange(count) for start, count in zip(before, counts, strict=True)])
        # Shuffled, or a rank and a micro-batch would hold one source alone.
        order = _permutation(self._global_batch_size, self._seed, step, stream=1)
        tokens = []
        for place in order[places.start : places.stop]:
            source = int(sources[place])
            stream = self._mixed_train[source]
            window = self._window(int(numbers[place]), (len(stream) - 1) // self._seq_len, source)
            tokens.append(self._read(stream, window))
        return tokens

    def _window(self, number: int, num_windows: int, source: int = _ALL_SOURCES) -> int:
        """The window that the `number`-th sequence of a source reads."""
        epoch, position = divmod(number, num_windows)
        drawn_epoch, order = self._orders.get(source, (None, np.empty(0, dtype=np.int64)))
        if drawn_epoch != epoch:
            # Stream 0 orders the whole text and stream 1 the batches; a source's own begin at 2.
            order = _permutation(num_windows, self._seed, epoch, stream=0 if source == _ALL_SOURCES else 2 + source)
            self._orders[source] = (epoch, order)
        return int(order[position])

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


def _permutation(size: int, seed: int, epoch: int, *, stream: int) -> IndexArray:
    """An order of `size` things; `stream` keeps apart what would otherwise have the same seed and epoch."""
    # By sorting raw Philox numbers, a stream that numpy promises to keep: what Generator.permutation gives may change
    # with numpy's version, and with it the data of a resumed run.
    key = np.array([seed, epoch + (stream << 48)], dtype=np.uint64)
    keys = np.random.Philox(key=key).random_raw(size)
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
