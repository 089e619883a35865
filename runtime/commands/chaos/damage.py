"""Damages the files of a run that is down. Resuming must then be refused, and must change nothing."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from runtime.commands.chaos.plan import UNIT, ChaosFault
from runtime.commands.chaos.record import read_record
from runtime.commands.chaos.target import TargetRun, Unfulfilled
from workers.record.run_log import HISTORY, METRICS

# A context manager, made from a run and a fault: it damages a file on entering and restores it on leaving. Its value is
# a regular expression that the refusal to resume must match.
Damage = Callable[[TargetRun, ChaosFault], AbstractContextManager[str]]


@contextlib.contextmanager
def damaged_before(_: TargetRun, fault: ChaosFault) -> Iterator[str]:
    """Damage nothing: the fault itself did, before the driver died. The promise is that of its kind."""
    yield fault.kind.promise


@contextlib.contextmanager
def damaged_line(run: TargetRun, fault: ChaosFault) -> Iterator[str]:
    """Make a line in the middle of metrics.jsonl unreadable."""
    step = _step(fault)
    with _changed(run.run_dir / METRICS, lambda raw: _line(raw, step).sub(b'{"kind": "tr\x00\xff\n', raw)):
        yield rf"metrics\.jsonl.*\b{step}\b"


@contextlib.contextmanager
def missing_line(run: TargetRun, fault: ChaosFault) -> Iterator[str]:
    """Remove a line in the middle of metrics.jsonl."""
    step = _step(fault)
    with _changed(run.run_dir / METRICS, lambda raw: _line(raw, step).sub(b"", raw)):
        yield rf"metrics\.jsonl.*\b{step}\b"


@contextlib.contextmanager
def missing_record(run: TargetRun, fault: ChaosFault) -> Iterator[str]:
    """Remove a record in the middle of history.bin."""
    step = _step(fault)
    loads = read_record(run.run_dir).loads
    with _changed(run.run_dir / HISTORY, lambda _: b"".join(raw for each, raw in loads if each != step)):
        yield rf"history\.bin.*\b{step}\b"


DAMAGES: dict[str, Sequence[Damage]] = {
    "damage_checkpoint_and_kill_driver": (damaged_before,),
    "hole_in_record": (damaged_line, missing_line, missing_record),
}


def _step(fault: ChaosFault) -> int:
    """Choose a step long before the checkpoint from which the run would resume."""
    return max(1, fault.step - UNIT)


def _line(raw: bytes, step: int) -> re.Pattern[bytes]:
    """The pattern of the line of a training step, of which there must be one."""
    pattern = re.compile(rb'^\{"kind": "train".*"step": %d,.*\n' % step, re.MULTILINE)
    if len(pattern.findall(raw)) != 1:
        raise Unfulfilled(f"{METRICS} has {len(pattern.findall(raw))} lines of step {step}")
    return pattern


@contextlib.contextmanager
def _changed(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """Change a file, and restore it on leaving.

    Raises:
        Unfulfilled: meanwhile a file of its folder was changed: a resume that is refused must leave all as it is.
    """
    original = path.read_bytes()
    path.write_bytes(change(original))
    before = _files(path.parent)
    try:
        yield
        if differing := {name for name, _ in before.symmetric_difference(_files(path.parent))}:
            raise Unfulfilled(f"a start that was refused has changed {', '.join(sorted(differing))}")
    finally:
        path.write_bytes(original)


def _files(folder: Path) -> set[tuple[str, bytes]]:
    """Read names and contents of all files but the lock, which a refused start holds for a moment."""
    return {
        (path.name, path.read_bytes()) for path in folder.iterdir() if path.is_file() and "run.lock." not in path.name
    }
