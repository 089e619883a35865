"""The curves of a run: every number of metrics.jsonl by its step, read in chunks and kept in bounded memory.

A long file is first read at evenly spaced places (`spread`), which takes milliseconds, and then from its beginning.
Until that is done, the steps not read yet are drawn from those few lines. A window of few steps is read from the file
again, line by line, if the buckets in memory are wider than a step.
"""

import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.watch.buckets import Buckets, Spans, spans_of
from runtime.watch.curves import Curves, parsed, parsed_all, slim, table_of
from runtime.watch.regular_file import read_between
from runtime.watch.spread import last_lines, spread_lines
from runtime.watch.tail import Tail
from workers.record.record_lines import Line

RECENT = 64  # training lines over which pace and phases are averaged
NUM_SPREAD = 768  # evenly spaced lines for the first picture of a long file
INDEX_EVERY = 256  # lines
EXACT_STEPS = 2048  # a window of fewer steps is read line by line
_MAX_WAITING = 64  # lines of evaluations that may come before the first training line
_MAX_EXACT_BYTES = 2**26


class Metrics:
    """metrics.jsonl of one run. One thread calls `poll`; the other methods may be called on any thread."""

    def __init__(self, path: Path) -> None:
        self._path, self._tail = path, Tail(path)
        self._lock = threading.Lock()
        self._waiting: list[Line] = []  # lines kept until a training line shows which curves there are
        self._curves = Curves((), 0)
        self._column: dict[str, int] = {}  # by name of a curve; empty before the curves are known
        self._buckets = Buckets(0)
        self._spread = self._curves.table([])  # evenly spaced lines; none once the whole file has been read
        self._index: list[tuple[int, int]] = []  # step and offset of every INDEX_EVERY-th line
        # Lines read from the beginning, the last step among them, and the file's size when its end was last read.
        self._num_lines = self._read_step = self._end_seen = 0
        self.latest: Line = {}  # training line of the last step
        self.recent: deque[Line] = deque(maxlen=RECENT)
        self.first_eval: Line = {}
        self.last_eval: Line = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the curves; () before the first training step."""
        return tuple(self._column)

    @property
    def own_metrics(self) -> tuple[str, ...]:
        """The names of the curves of metrics that the user added."""
        return self._curves.own_metrics

    @property
    def share_read(self) -> float:
        """Share of the file that has been read from its beginning; 1 once the curves are drawn from all lines."""
        return 1.0 if self._tail.is_at_end else self._tail.offset / self._tail.size

    @property
    def last_step(self) -> int:
        """The last training step."""
        return int(self.latest.get("step", 0))

    def poll(self) -> bool:
        """Read on. Returns whether there was something new.

        Raises:
            Rewritten: the file is not the one that was read; a new object must read it.
        """
        lines = self._tail.read()
        found = parsed_all(text for _, text in lines)
        if not self._column:
            self._waiting += found
            if not _suffice_for_curves(self._waiting):
                return bool(found)
            found, self._waiting = self._waiting, []
            self._choose_curves(found)
        self._index_lines(lines)
        self._add(found)
        self._read_the_end()
        return bool(lines)

    def spans(self, names: Sequence[str], first: int, last: int, num: int) -> Spans:
        """At most 2 × `num` spans of the steps from `first` to `last`: what has been read, and what has not yet.

        An unknown name is a curve without a value.
        """
        with self._lock:
            columns = [self._column.get(name, -1) for name in names]
            known = [column for column in columns if column >= 0]
            read_step, spread = self._read_step, self._spread
            is_exact = last - first < EXACT_STEPS and self._buckets.width > 1
            found = self._buckets.spans(first, min(last, read_step), num, known)
        if is_exact and found.first.size:
            found = self._exact(first, min(last, read_step), num, [name for name in names if name in self._column])
        if last > read_step:
            later = spans_of(spread.steps, spread.values[:, known], max(first, read_step + 1), last, num)
            found = found.followed_by(later)
        return _with_unknown(found, columns)

    def _exact(self, first: int, last: int, num: int, names: list[str]) -> Spans:
        lines = [line for line in self._lines_around(first, last) if first <= line["step"] <= last]
        steps, values = table_of(lines, names)
        return spans_of(steps, values, first, last, num)

    def _lines_around(self, first: int, last: int) -> list[Line]:
        with self._lock:
            steps = [step for step, _ in self._index]
            begin, end = max(bisect_left(steps, first) - 1, 0), bisect_right(steps, last)
            start = self._index[begin][1] if self._index else 0
            stop = self._index[end][1] if end < len(self._index) else self._tail.offset
        raw = read_between(self._path, start, min(stop, start + _MAX_EXACT_BYTES))
        return parsed_all(raw.split(b"\n"))

    def _choose_curves(self, lines: list[Line]) -> None:
        """Choose the curves, and read the evenly spaced lines of a long file."""
        if not self._tail.is_at_end:
            lines = parsed_all(spread_lines(self._path, NUM_SPREAD))
            lines.sort(key=lambda line: line["step"])
            self._note([line for line in lines if line["kind"] == "eval"])
        curves = Curves.in_lines(lines)
        with self._lock:
            self._curves, self._column = curves, {name: number for number, name in enumerate(curves.names)}
            self._buckets = Buckets(len(curves.names))
            self._spread = curves.table([] if self._tail.is_at_end else lines)

    def _index_lines(self, lines: list[tuple[int, bytes]]) -> None:
        for offset, text in lines:
            if self._num_lines % INDEX_EVERY == 0 and (line := parsed(text)) is not None:
                with self._lock:
                    self._index.append((line["step"], offset))
            self._num_lines += 1

    def _add(self, lines: list[Line]) -> None:
        if not lines:
            return
        steps, values = self._curves.table(lines)
        with self._lock:
            self._buckets.add(steps, values)
            self._read_step = max(self._read_step, int(steps.max()))
        self._note(lines)

    def _read_the_end(self) -> None:
        """Read the last lines of a long file: the page shows the present before all of the past has been read."""
        if self._tail.is_at_end:
            self._spread = self._curves.table([])
        elif self._tail.size != self._end_seen:
            self._end_seen = self._tail.size
            lines = parsed_all(last_lines(self._path, RECENT))
            self._note(lines)
            # `recent` may hold lines of the beginning. It is replaced, so that the pace is the present one.
            train = [slim(line) for line in lines if line["kind"] == "train"]
            self.recent = deque(train, maxlen=RECENT)

    def _note(self, lines: list[Line]) -> None:
        for line in lines:
            if line["kind"] == "train" and line["step"] > self.last_step:
                self.latest = line
                self.recent.append(slim(line))
            elif line["kind"] == "eval":
                self._note_eval(slim(line))

    def _note_eval(self, line: Line) -> None:
        if not self.first_eval or line["step"] < self.first_eval["step"]:
            self.first_eval = line
        if not self.last_eval or line["step"] >= self.last_eval["step"]:
            self.last_eval = line


def _suffice_for_curves(lines: list[Line]) -> bool:
    """Whether the curves can be chosen by these lines: a training line is among them, or too many to wait longer."""
    return len(lines) >= _MAX_WAITING or any(line["kind"] == "train" for line in lines)


def _with_unknown(found: Spans, columns: list[int]) -> Spans:
    """Put a column of NaN where a curve is not known."""
    nan = np.full((len(found.first), 1), np.nan)
    known = [column for column in columns if column >= 0]
    places = [known.index(column) if column >= 0 else len(known) for column in columns]
    low, high, mean = (np.hstack([each, nan])[:, places] for each in (found.low, found.high, found.mean))
    return Spans(found.first, found.last, low, high, mean)
