"""Damage to what a run has on the disk, done while it is down: resuming is to refuse it, and to change nothing."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from runtime.chaos.plan import UNIT, ChaosFault
from runtime.chaos.record import read_record
from runtime.chaos.target import TargetRun, Unfulfilled
from workers.run_log import HISTORY, METRICS

# Given a run and a fault: done on entering; yields a regular expression of what is to be said; undone on leaving.
Damage = Callable[[TargetRun, ChaosFault], AbstractContextManager[str]]


@contextlib.contextmanager
def _none(_: TargetRun, fault: ChaosFault) -> Iterator[str]:
    """What was damaged before the driver died, as the kind promises."""
    yield fault.kind.promise


@contextlib.contextmanager
def damaged_line(run: TargetRun, fault: ChaosFault) -> Iterator[str]:
    """A line in the middle of metrics.jsonl is no line any more."""
    step = _step(fault)
    with _changed(run.run_dir / METRICS, lambda raw: _line(raw, step).sub(b'{"kind": "tr\x00\xff\n', raw)):
        yield rf"metrics\.jsonl.*\b{step}\b"


@contextlib.contextmanager
def missing_line(run: TargetRun, fault: ChaosFault) -> Iterator[str]:
    """A line in the middle of metrics.jsonl is missing."""
    step = _step(fault)
    with _changed(run.run_dir / METRICS, lambda raw: _line(raw, step).sub(b"", raw)):
        yield rf"metrics\.jsonl.*\b{step}\b"


@contextlib.contextmanager
def missing_record(run: TargetRun, fault: ChaosFault) -> Iterator[str]:
    """A record in the middle of history.bin is missing."""
    step = _step(fault)
    loads = read_record(run.run_dir).loads
    with _changed(run.run_dir / HISTORY, lambda _: b"".join(raw for at, raw in loads if at != step)):
        yield rf"history\.bin.*\b{step}\b"


DAMAGES: dict[str, Sequence[Damage]] = {
    "damage_checkpoint_and_kill_driver": (_none,),
    "hole_in_record": (damaged_line, missing_line, missing_record),
}


def _step(fault: ChaosFault) -> int:
    """Long before the checkpoint that the run would go on from."""
    return max(1, fault.step - UNIT)


def _line(raw: bytes, step: int) -> re.Pattern[bytes]:
    """The line of a training step."""
    pattern = re.compile(rb'^\{"kind": "train".*"step": %d,.*\n' % step, re.MULTILINE)
    if len(pattern.findall(raw)) != 1:
        raise Unfulfilled(f"{METRICS} has {len(pattern.findall(raw))} lines of step {step}")
    return pattern


@contextlib.contextmanager
def _changed(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """Have a file changed for a while. Its folder, which holds the records, must be left as it is."""
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    before = _files(path.parent)
    try:
        yield
        if differing := {name for name, _ in before.symmetric_difference(_files(path.parent))}:
            raise Unfulfilled(f"a start that was refused has changed {', '.join(sorted(differing))}")
    finally:
        path.write_bytes(whole)


def _files(folder: Path) -> set[tuple[str, bytes]]:
    """Names and contents, but for the lock, which a start that is refused holds for a moment."""
    return {
        (path.name, path.read_bytes()) for path in folder.iterdir() if path.is_file() and "run.lock." not in path.name
    }
