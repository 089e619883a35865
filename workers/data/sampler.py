"""Decides which sequences each rank reads at each step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dispatch.errors import InvalidValue
from dispatch.values import to_device
from workers.data.mix import IndexArray, MixCounts, MixSchedule
from workers.data.shards import Dataset, FlagArray, TokenArray
from workers.data.windows import DocumentWindows, TextWindows, Windows

_ALL_SOURCES = -1  # in place of the index of a source: the whole training stream


class Batch(NamedTuple):
    """Sequences that one rank trains on together.

    Attributes:
        input_ids: int64 (B, S).
        targets: int64 (B, S), -100 where none is learned.
        document_starts: int64 (B, S), the index in its row at which each token's document begins; None where a row is
            one document.
    """

    input_ids: Tensor
    targets: Tensor
    document_starts: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device, without waiting for it."""
        starts = None if self.document_starts is None else to_device(self.document_starts, device)
        return Batch(to_device(self.input_ids, device), to_device(self.targets, device), starts)

    @classmethod
    def of(cls, rows: Sequence[IndexArray], *, has_documents: bool) -> "Batch":
        """Stack the windows of sequences. rows: int64 (3, S) each, from `Windows.read`."""
        ids, targets, starts = torch.from_numpy(np.stack(rows)).unbind(1)
        return cls(ids.contiguous(), targets.contiguous(), starts.contiguous() if has_documents else None)


@dataclass(frozen=True)
class ValBatch:
    """Held-out sequences of one rank. Padding repeats a real sequence, so that every rank makes as many batches."""

    sequences: Batch
    source_B: Tensor  # (B,) int64, index into `Dataset.source_names`
    is_real_B: Tensor  # (B,) bool, False for padding: neither its loss nor its tokens count


class Sampler:
    """Draws batches as a function of the seed and the step. It has no state that a resumed run would have to restore.

    The training stream is cut into windows (`workers.data.windows`), by whole documents if the stream has their flags.
    An epoch visits every window once, in an order that depends on the seed and the epoch alone. With a mix every source
    has its own windows and epochs, and each sequence comes from one source: a step holds as many of each source as
    `workers.data.mix` says, in an order that depends on the seed and the step.
    """

    def __init__(
        self, dataset: Dataset, seq_len: int, global_batch_size: int, seed: int, mix: MixSchedule | None = None
    ) -> None:
        if seq_len < 1 or global_batch_size < 1:
            raise ValueError(f"seq_len ({seq_len}) and global_batch_size ({global_batch_size}) must be at least 1")
        if not 0 <= seed < 1 << 63:
            raise InvalidValue(f"seed ({seed}) must be at least 0 and below 2**63")
        self._has_documents = dataset.train_flags is not None
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._train = _cut(dataset.train, dataset.train_flags, seq_len, "the training text")
        self.num_windows = len(self._train)
        flags = dataset.val_flags or [None] * len(dataset.val)
        self._val = [
            _cut(stream, stream_flags, seq_len, f"the held-out text of source {name!r}")
            for stream, stream_flags, name in zip(dataset.val, flags, dataset.source_names, strict=True)
        ]
        self._mix, self._mixed_train = self._open_mix(dataset, mix or MixSchedule())
        # By source: the epoch that was drawn from last, and the order of its windows. A cache, no state of a run.
        self._orders: dict[int, tuple[int, IndexArray]] = {}

    def batch(self, step: int, rank: int, world_size: int, micro: int = 0, num_micro: int = 1) -> Batch:
        """Draw the sequences of one micro-batch of one rank.

        The global batch of a step is the same for every `world_size` and `num_micro`; in the order of (rank, micro)
        they divide it. Steps count from 0.

        Returns:
            B = global_batch_size / (world_size * num_micro) of them.
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
        drawn = self._draw(step, range(first, first + size))
        return Batch.of([windows.read(window) for windows, window in drawn], has_documents=self._has_documents)

    def num_targets(self, step: int) -> int:
        """How many targets the global batch of a step has. Every rank computes the number without a collective."""
        if not self._has_documents:
            return self._global_batch_size * self._seq_len
        drawn = self._draw(step, range(self._global_batch_size))
        return sum(windows.num_targets(window) for windows, window in drawn)

    def val_batches(
        self, rank: int, world_size: int, batch_size: int, max_sequences: int | None = None
    ) -> Iterator[ValBatch]:
        """Yield this rank's share of the held-out sequences; every rank makes the same number of batches of one size.

        Which sequences are read does not depend on `world_size`. Sources take part in proportion to their length,
        each with one sequence at least.

        Args:
            max_sequences: about how many are read over all ranks, evenly spaced; None for all.
        """
        chosen = self._choose_val(max_sequences)
        share = -(-len(chosen) // world_size)
        mine = chosen[rank * share : (rank + 1) * share]
        num_batches = -(-share // batch_size)
        padded = mine + [chosen[0]] * (num_batches * batch_size - len(mine))
        for start in range(0, len(padded), batch_size):
            part = padded[start : start + batch_size]
            rows = [self._val[source].read(window) for source, window in part]
            sequences = Batch.of(rows, has_documents=self._has_documents)
            is_real_B = torch.arange(start, start + batch_size) < len(mine)
            yield ValBatch(sequences, torch.tensor([source for source, _ in part]), is_real_B)

    def _open_mix(self, dataset: Dataset, mix: MixSchedule) -> tuple[MixCounts | None, list[Windows]]:
        """The counts of a mix, and the training windows of each source; None and nothing without a mix."""
        mix.check_sources(dataset.source_names)
        if not mix.before:
            return None, []
        flags = dataset.train_flags_by_source or [None] * len(dataset.source_names)
        by_source = [
            _cut(stream, stream_flags, self._seq_len, f"the training text of source {name!r}")
            for stream, stream_flags, name in zip(dataset.train_by_source, flags, dataset.source_names, strict=True)
        ]
        return MixCounts(mix, self._global_batch_size), by_source

    def _draw(self, step: int, indices: range) -> list[tuple[Windows, int]]:
        """The sequences at these indices of the step's global batch: for each the windows of its stream, and which."""
        if self._mix is not None:
            return self._draw_mixed(self._mix, step, indices)
        numbers = [step * self._global_batch_size + index for index in indices]
        return [(self._train, self._window(number, self.num_windows)) for number in numbers]

    def _draw_mixed(self, mix: MixCounts, step: int, indices: range) -> list[tuple[Windows, int]]:
        counts, before = mix.counts_at(step), mix.counts_before(step)
        # (B,) each: the source of a sequence, and its number among all sequences that the run draws of this source.
        sources = np.repeat(np.arange(len(counts)), counts)
        numbers = np.concatenate([start + np.arange(count) for start, count in zip(before, counts, strict=True)])
        # Shuffled, since otherwise a rank or a micro-batch would hold one source only.
        order = _permutation(self._global_batch_size, self._seed, step, stream=1)
        drawn = []
        for index in order[indices.start : indices.stop]:
            source = int(sources[index])
            windows = self._mixed_train[source]
            drawn.append((windows, self._window(int(numbers[index]), len(windows), source)))
        return drawn

    def _window(self, number: int, num_windows: int, source: int = _ALL_SOURCES) -> int:
        """The window that the `number`-th sequence of a source reads."""
        epoch, position = divmod(number, num_windows)
        drawn_epoch, order = self._orders.get(source, (None, np.empty(0, dtype=np.int64)))
        if drawn_epoch != epoch:
            # Random stream 0 orders the whole text, 1 the sequences of mixed batches, and 2 + source each source.
            order = _permutation(num_windows, self._seed, epoch, stream=0 if source == _ALL_SOURCES else 2 + source)
            self._orders[source] = (epoch, order)
        return int(order[position])

    def _choose_val(self, max_sequences: int | None) -> list[tuple[int, int]]:
        """(source, window) of the held-out sequences to read."""
        counts = [len(windows) for windows in self._val]
        total = sum(counts)
        wanted = total if max_sequences is None else min(max_sequences, total)
        spare = max(0, wanted - len(counts))
        chosen = []
        for source, num_windows in enumerate(counts):
            num_chosen = num_windows if wanted == total else min(num_windows, 1 + spare * num_windows // total)
            chosen += [(source, index * num_windows // num_chosen) for index in range(num_chosen)]
        return chosen


def _permutation(size: int, seed: int, epoch: int, *, stream: int) -> IndexArray:
    """A random order of range(size). stream: makes orders of the same seed and epoch independent of each other."""
    # Raw Philox numbers are sorted, since numpy promises to keep their stream. Generator.permutation may change with
    # numpy's version, and would change the data of a resumed run.
    key = np.array([seed, epoch + (stream << 48)], dtype=np.uint64)
    keys = np.random.Philox(key=key).random_raw(size)
    return np.argsort(keys, kind="stable")


def _cut(tokens: TokenArray, flags: FlagArray | None, seq_len: int, what: str) -> Windows:
    """The windows of a stream, by whole documents where it has flags. Raises InvalidValue where it is too short.

    what: names the stream in the error.
    """
    if len(tokens) <= seq_len:
        raise InvalidValue(
            f"{what} has {len(tokens)} tokens, but one sequence needs {seq_len + 1}; "
            "give more text, hold out another share (--data.val_fraction) or use shorter sequences"
        )
    return TextWindows(tokens, seq_len) if flags is None else DocumentWindows(tokens, flags, seq_len)
