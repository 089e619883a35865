"""The load of every expert through time, read from load/history.bin for each request: nothing of it is kept in memory.

The file of a run of 1,000,000 steps × 61 layers × 256 experts is 187 GB large. So a column of a heat map sums at most
RECORDS_A_COLUMN records of the steps that it covers, evenly spaced; for a window of few steps these are all. E experts
of a layer; N experts of all layers; C columns.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dispatch.layout import LoadLayout
from runtime.watch.regular_file import opened, read_at_most
from workers.record.run_log import HISTORY, LAYOUT

RECORDS_A_COLUMN = 4
LAST_RECORDS = 10  # summed for the picture of all layers
MAX_EXPERTS = 2**22  # of all layers; a layout with more counts as damaged, since the file may come from anybody
_MAX_LAYOUT_BYTES = 2**22
_STEP_BYTES = 8
_COUNT, _BIAS = np.dtype("<i8"), np.dtype("<f4")


class LoadColumns(NamedTuple):
    """The load of one layer in C spans of steps."""

    steps: NDArray[np.int64]
    """(C,): the first step of each."""
    counts: NDArray[np.int64]
    """(C, E): tokens that chose the expert, over the records that were read."""
    bias: NDArray[np.float32]
    """(C, E): the bias that routed the first step of each; (C, 0) without `with_bias`."""
    num_records: int
    """Records in the window, of which `num_read` were read."""
    num_read: int


class LastLoad(NamedTuple):
    """The load of all layers over the last records, one layer after the other."""

    first: int
    """Step of the first record, and `last` of the last one."""
    last: int
    num: int
    """Records that are summed."""
    counts_N: NDArray[np.int64]
    bias_N: NDArray[np.float32]
    """Of the last record."""

    def shares(self, layout: LoadLayout) -> list[NDArray[np.float64]]:
        """By layer, (E,): load of each expert over the mean load of its layer; 0 for a layer without load."""
        counts = [self.counts_N[where] for where in layout.slices]
        return [counts_E / max(float(counts_E.mean()), 1e-9) for counts_E in counts]


class LoadFile:
    """load/history.bin of one run."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._layout: LoadLayout | None = None

    @property
    def layout(self) -> LoadLayout | None:
        """The MoE layers; None before the run has begun, or if the file is damaged."""
        if self._layout is None:
            self._layout = _read_layout(self._run_dir / LAYOUT)
        return self._layout

    def columns(self, layer: int, first: int, last: int, num: int, *, with_bias: bool = False) -> LoadColumns | None:
        """The load of a layer in at most `num` spans of the steps from `first` to `last`; None if there is none."""
        with self._records() as records:
            if records is None or not 0 <= layer < len(records.layout.names):
                return None
            begin, end = records.find(first), records.find(last + 1)
            if begin >= end:
                return None
            return _columns(records, records.layout.slices[layer], begin, end, num, with_bias=with_bias)

    def last(self, until: int | None = None) -> LastLoad | None:
        """The load of all layers over the last records, up to step `until` if it is given; None if there are none."""
        with self._records() as records:
            end = 0 if records is None else records.num if until is None else records.find(until + 1)
            if records is None or not end:
                return None
            all_experts = slice(0, records.layout.total)
            numbers = range(max(0, end - LAST_RECORDS), end)
            counts = sum((records.counts(number, all_experts) for number in numbers), np.zeros(1, np.int64))
            bias = records.bias(end - 1, all_experts)
            return LastLoad(records.step(numbers[0]), records.step(numbers[-1]), len(numbers), counts, bias)

    @contextmanager
    def _records(self) -> "Iterator[_Records | None]":
        layout = self.layout
        with opened(self._run_dir / HISTORY) as fd:
            yield None if fd is None or layout is None or not layout.total else _Records(fd, layout)


class _Records:
    """The records of an open file by their number, in order of steps. Each method reads only what it returns.

    `experts` is a slice of the experts of all layers, such as one of `layout.slices`.
    """

    def __init__(self, fd: int, layout: LoadLayout) -> None:
        self.layout, self._fd = layout, fd
        self._size = _STEP_BYTES + layout.total * (_COUNT.itemsize + _BIAS.itemsize)
        self.num = os.fstat(fd).st_size // self._size

    def step(self, number: int) -> int:
        return int(self._read(number, 0, _COUNT, 1)[0])

    def counts(self, number: int, experts: slice) -> NDArray[np.int64]:
        return self._read(number, _STEP_BYTES + experts.start * _COUNT.itemsize, _COUNT, experts.stop - experts.start)

    def bias(self, number: int, experts: slice) -> NDArray[np.float32]:
        start = _STEP_BYTES + self.layout.total * _COUNT.itemsize + experts.start * _BIAS.itemsize
        return self._read(number, start, _BIAS, experts.stop - experts.start)

    def find(self, step: int) -> int:
        """The number of the first record of `step` or a later one."""
        return bisect_left(range(self.num), step, key=self.step)

    def _read(self, number: int, start: int, item: np.dtype[Any], num: int) -> NDArray[Any]:
        num_bytes = num * item.itemsize
        raw = os.pread(self._fd, num_bytes, number * self._size + start) if num else b""
        # Filled with zeros: a run that resumes may cut the file while it is read.
        return np.frombuffer(raw.ljust(num_bytes, b"\0"), item)


def _columns(records: _Records, experts: slice, begin: int, end: int, num: int, *, with_bias: bool) -> LoadColumns:
    edges = np.linspace(begin, end, min(num, end - begin) + 1).astype(np.int64)
    steps, counts, bias, num_read = [], [], [], 0
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        numbers = _spread_over(start, stop, RECORDS_A_COLUMN)
        num_read += len(numbers)
        steps.append(records.step(start))
        counts.append(sum((records.counts(number, experts) for number in numbers[1:]), records.counts(start, experts)))
        bias.append(records.bias(start, experts if with_bias else slice(0, 0)))
    return LoadColumns(np.array(steps), np.array(counts), np.array(bias), end - begin, num_read)


def _spread_over(start: int, stop: int, num: int) -> list[int]:
    """At most `num` numbers of range(start, stop), evenly spaced, `start` among them."""
    num = min(num, stop - start)
    return [start + (stop - start) * each // num for each in range(num)]


def _read_layout(path: Path) -> LoadLayout | None:
    try:
        stored = json.loads(read_at_most(path, _MAX_LAYOUT_BYTES) or b"")
        names, sizes = [str(name) for name in stored["names"]], stored["num_experts"]
        layout = LoadLayout(tuple(names), tuple(sizes), tuple(bool(each) for each in stored["balanced"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_sound = all(type(size) is int and size > 0 for size in sizes)
    return layout if is_sound and layout.total <= MAX_EXPERTS else None
