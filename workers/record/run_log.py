"""The records of a run directory: one writer, and the readers for reports and scripts. Format: docs/run-directory.md.

Needs no torch. Shapes: S recorded steps, N experts of all MoE layers (see dispatch.layout).
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dispatch.errors import InvalidValue
from dispatch.layout import LoadLayout
from workers.record.append_file import AppendFile, keep_lines, keep_parts
from workers.record.record_lines import Line, complete_lines, is_sound, sort_lines
from workers.record.run_fence import RunFence, directory_lost
from workers.record.sample_log import SAMPLES, cut_back_samples
from workers.record.statistic_log import STATISTICS, cut_back_statistics, pack_statistic

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LAYOUT = "load/layout.json"
HISTORY = "load/history.bin"
MAX_TIME = 4e9  # of events, Unix seconds: the year 2096

_logger = logging.getLogger(__name__)


class LoadHistory(NamedTuple):
    """Load and bias of every recorded step. Shapes: S steps; N experts of all MoE layers, layer by layer."""

    steps: NDArray[np.int64]
    """(S,), increasing, counted from 1."""
    counts: NDArray[np.int64]
    """(S, N): tokens of the global batch that chose each expert."""
    bias: NDArray[np.float32]
    """(S, N): the selection bias that routed the step."""
    layout: LoadLayout
    """Names and sizes of the layers; `layout.slices` are the columns of each."""


class RunLog:
    """Writes metrics, events and load history of one run. One writer per run directory.

    Other processes can read what a call wrote when it returns. A full disk never stops the run: `on_warning` is called
    once, and the records are kept in memory and written when there is space.
    """

    def __init__(
        self,
        path: Path,
        layout: LoadLayout,
        resume_step: int | None = None,
        *,
        on_warning: Callable[[str], None] = _logger.warning,
        has_statistic: bool = False,
        has_samples: bool = False,
        fence: RunFence | None = None,
    ) -> None:
        """Start the records of a run, or go on with them after `resume_step` optimizer steps.

        has_statistic: whether `load` will be called with a statistic. has_samples: whether `samples` will be called.
        fence: checks that the directory still belongs to this run; None where it has no lock.

        Resuming moves all lines and records after `resume_step` to *.superseded files, so that no step occurs twice.

        Raises:
            InvalidValue: the directory already holds a run (without resume_step), or one of another model (with it).
        """
        if resume_step is None:
            if (path / METRICS).exists():
                raise InvalidValue(f"{path} already holds a run; choose another --name, or go on with --resume {path}")
            (path / LAYOUT).parent.mkdir(parents=True, exist_ok=True)
            (path / LAYOUT).write_text(json.dumps(asdict(layout)) + "\n")
        else:
            _cut_back(path, layout, resume_step)
        self._path, self._fence = path, fence
        self._record = _record_dtype(layout)
        self._on_warning = on_warning
        self._warned = False
        self._metrics, self._events = AppendFile(path / METRICS), AppendFile(path / EVENTS)
        self._history = AppendFile(path / HISTORY)
        self._statistics = AppendFile(path / STATISTICS) if has_statistic else None
        self._samples = AppendFile(path / SAMPLES) if has_samples else None
        files = (self._metrics, self._events, self._history, self._statistics, self._samples)
        self._files = [file for file in files if file is not None]

    def train(self, line: Mapping[str, Any]) -> None:
        """Record a training step. `step` counts optimizer steps, 1 for the first; the caller keeps it increasing.

        Raises:
            RunDirectoryLost: the directory is no longer this run's; nothing was written.
        """
        self.check()
        self._metrics_line("train", line)

    def eval(self, line: Mapping[str, Any]) -> None:
        """Record an evaluation made after `step` optimizer steps."""
        self._metrics_line("eval", line)

    def event(self, name: str, **details: Any) -> None:
        """Record that something happened to the run."""
        self._write(self._events, _as_line({"time": time.time(), "event": name, **details}))

    def load(self, step: int, counts_N: ArrayLike, bias_N: ArrayLike, statistic: ArrayLike | None = None) -> None:
        """Record the global load of a step, the bias that routed it and the law's statistic. Arrays or CPU tensors."""
        record = np.zeros((), self._record)
        record["step"], record["counts"], record["bias"] = step, np.asarray(counts_N), np.asarray(bias_N)
        self._write(self._history, record.tobytes())
        if self._statistics is not None and statistic is not None:
            self._write(self._statistics, pack_statistic(step, statistic))

    def samples(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Record the texts that were continued after `step` optimizer steps."""
        if self._samples is not None:
            now = {"step": step, "time": time.time()}
            self._write(self._samples, b"".join(_as_line({**now, **line}) for line in lines))

    def sync(self) -> None:
        """Force all records to the disk. Called before a checkpoint is written, which must not be ahead of its records.

        Raises RunDirectoryLost as `train` does.
        """
        self.check()
        for file in self._files:
            file.sync()
        self._tell_trouble()

    def check(self) -> None:
        """Raise RunDirectoryLost if the directory belongs to another run, or no longer has the files that are open."""
        if self._fence is not None:
            self._fence.check()
        if not self._metrics.is_in_place():
            raise directory_lost(self._path, f"{METRICS} was removed or replaced")

    def close(self) -> None:
        """Close the files. Records that a full disk still does not take are lost, with a warning. May be repeated."""
        for file in self._files:
            file.close()
            if file.num_missing_bytes:
                self._on_warning(f"{file.path}: the last {file.num_missing_bytes} bytes are lost ({file.trouble})")
        self._files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _metrics_line(self, kind: str, line: Mapping[str, Any]) -> None:
        self._write(self._metrics, _as_line({"kind": kind, "time": time.time(), **line}))

    def _write(self, file: AppendFile, data: bytes) -> None:
        file.write(data)
        # All files and not only this one: an event that is waiting in memory must not wait for the next event.
        for each in self._files:
            each.flush()
        self._tell_trouble()

    def _tell_trouble(self) -> None:
        troubles = [file for file in self._files if file.trouble]
        if troubles and not self._warned:
            what = f"cannot write {troubles[0].path} ({troubles[0].trouble})"
            self._on_warning(f"{what}: the run goes on and keeps its records in memory; free some space")
        elif self._warned and not troubles:
            self._on_warning("the records of the run are complete on the disk again")
        self._warned = bool(troubles)


def append_event(path: str | Path, name: str, /, **details: Any) -> None:
    """Record an event from outside the run's own writer: the failure that ended it, for example."""
    file = AppendFile(Path(path) / EVENTS)
    file.write(_as_line({"time": time.time(), "event": name, **details}))
    file.close()


def read_metrics(path: str | Path) -> tuple[list[Line], list[Line]]:
    r"""Read metrics.jsonl of a run, also while the run goes on.

    Args:
        path: the run directory.
    Returns:
        The lines of training steps and those of evaluations, each a dict, in order of steps. The fields are listed in
        docs/run-directory.md. A last line that is not complete yet is left out.
    Raises:
        InvalidValue: there is no run, or a line other than the last is damaged. It is also a ValueError.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from runtime import read_metrics
        >>> with TemporaryDirectory() as run:
        ...     lines = '{"kind": "train", "step": 1, "time": 0.0, "loss": 5.5}\n{"kind": "tra'
        ...     _ = (Path(run) / "metrics.jsonl").write_text(lines)
        ...     steps, evaluations = read_metrics(run)
        >>> [step["loss"] for step in steps]
        [5.5]
    """
    lines = _read_lines(Path(path) / METRICS, is_sound)
    return [line for line in lines if line["kind"] == "train"], [line for line in lines if line["kind"] == "eval"]


def read_events(path: str | Path) -> list[Line]:
    """Read events.jsonl of a run, oldest first, also while the run goes on.

    Args:
        path: the run directory.
    Returns:
        Dicts with `event` (its name), `time` (Unix seconds) and the fields listed in docs/run-directory.md.
    Raises:
        InvalidValue: there is no run, or a line other than the last is damaged. It is also a ValueError.
    """
    return _read_lines(Path(path) / EVENTS, _is_event)


def _is_event(line: Line) -> bool:
    seconds: Any = line.get("time")
    return isinstance(line.get("event"), str) and type(seconds) in (int, float) and 0 <= seconds < MAX_TIME


def read_load_history(path: str | Path) -> LoadHistory:
    """Open the load history of a run. The arrays are mapped from the disk, so that long runs need no memory.

    Args:
        path: the run directory.
    Returns:
        Steps, counts, biases and the layout of layers. A last record that is not complete yet is left out.
    Raises:
        InvalidValue: there is no run. It is also a ValueError.
    """
    path = Path(path)
    layout = _read_layout(path)
    dtype = _record_dtype(layout)
    num_records = (path / HISTORY).stat().st_size // dtype.itemsize
    # numpy cannot map an empty file.
    records = np.memmap(path / HISTORY, dtype, "r", shape=num_records) if num_records else np.zeros(0, dtype)
    return LoadHistory(records["step"], records["counts"], records["bias"], layout)


def _no_run(run_dir: Path, name: str) -> InvalidValue:
    return InvalidValue(
        f"{run_dir} has no {name}: it is no run, or one that has not begun to train; give the folder of a run, as "
        "runs/NAME"
    )


def _read_layout(path: Path) -> LoadLayout:
    if not (path / LAYOUT).exists():
        raise _no_run(path, LAYOUT)
    try:
        stored = json.loads((path / LAYOUT).read_text())
        return LoadLayout(*(tuple(stored[field]) for field in ("names", "num_experts", "balanced")))
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidValue(f"{path / LAYOUT} is damaged ({error!r:.60}); restore it from a copy") from error


def _record_dtype(layout: LoadLayout) -> np.dtype[np.void]:
    return np.dtype([("step", "<i8"), ("counts", "<i8", (layout.total,)), ("bias", "<f4", (layout.total,))])


def _read_lines(path: Path, is_sound: Callable[[Line], bool]) -> list[Line]:
    if not path.exists():
        raise _no_run(path.parent, path.name)
    lines = []
    for number, (_, line) in enumerate(complete_lines(path.read_bytes()), 1):
        if line is None or not is_sound(line):
            raise InvalidValue(f"{path}, line {number} is damaged; the rest can be read when you delete that line")
        lines.append(line)
    return lines


def _cut_back(path: Path, layout: LoadLayout, step: int) -> None:
    """Keep the lines and records up to `step`, and move the others aside."""
    if (stored := _read_layout(path)) != layout:
        raise InvalidValue(
            f"{path} recorded {stored.num_experts} experts in {stored.names}, and the model has {layout.num_experts} "
            f"in {layout.names}; resume with the run's own model settings"
        )
    raw = (path / METRICS).read_bytes()
    keep_lines(path / METRICS, raw, sort_lines(raw, step).kept)
    raw = (path / EVENTS).read_bytes()
    sound = [offset for offset, line in complete_lines(raw) if line is not None]
    keep_lines(path / EVENTS, raw, [(offset, raw.index(b"\n", offset) + 1) for offset in sound])
    dtype = _record_dtype(layout)
    steps = read_load_history(path).steps
    kept = [number * dtype.itemsize for number in np.flatnonzero(steps <= step).tolist()]
    # The incomplete record that a crash may leave at the end is dropped: it would shift all records that follow it.
    num_lost_bytes = (path / HISTORY).stat().st_size % dtype.itemsize
    parts = [(start, start + dtype.itemsize) for start in kept]
    keep_parts(path / HISTORY, path / "load" / "history.superseded.bin", parts, num_lost_bytes=num_lost_bytes)
    cut_back_statistics(path, step)
    cut_back_samples(path, step)


def _as_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(plain_values(values), allow_nan=False).encode() + b"\n"


def plain_values(value: Any) -> Any:
    """Convert to values that JSON has: arrays and tensors to lists or numbers, numbers that are not finite to null."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(each) for each in value]
    if hasattr(value, "tolist"):
        return plain_values(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
