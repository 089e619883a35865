"""Checks that the records of a run have every step up to the one that it resumes from. Needs no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workers.record.record_file import list_records
from workers.record.record_lines import Line, complete_lines, sort_lines
from workers.record.run_log import EVENTS, HISTORY, METRICS, read_load_history
from workers.record.sample_log import SAMPLES, damaged_samples
from workers.record.statistic_log import STATISTICS


@dataclass(frozen=True)
class Hole:
    """What is missing in a file of records. lines: numbers of damaged lines. steps: missing steps."""

    file: str
    lines: tuple[int, ...]
    steps: tuple[int, ...]

    def __str__(self) -> str:
        damaged = f"line {ranges(self.lines)} is damaged" if self.lines else ""
        missing = f"step {ranges(self.steps)} is missing" if self.steps else ""
        return f"{self.file}: " + ", ".join(filter(None, (damaged, missing)))

    def event(self) -> Line:
        """Details of the event `record_hole`."""
        return {"file": self.file, "lines": ranges(self.lines), "steps": ranges(self.steps)}


def find_holes(run: Path, step: int) -> list[Hole]:
    """Find which of the steps 1 to `step` are missing or damaged in the records of `run`.

    Lines and records after `step`, such as a line torn by a crash, are not checked: resuming moves them aside.
    """
    lines = sort_lines((run / METRICS).read_bytes(), step)
    metrics = Hole(METRICS, tuple(lines.bad), _missing(lines.steps, 1, step))
    history = Hole(HISTORY, (), _missing(read_load_history(run).steps.tolist(), 1, step))
    samples = Hole(SAMPLES, damaged_samples(run, step), ())  # no step need have any: run.sample_prompts may change
    holes = [metrics, history, _hole_in_statistics(run / STATISTICS, step), samples]
    return [hole for hole in holes if hole.lines or hole.steps]


def new_holes(run: Path, holes: Iterable[Hole]) -> list[Hole]:
    """The holes that no event of the run reports yet. Damaged lines are always new: resuming moves them aside."""
    path = run / EVENTS
    lines = [line for _, line in complete_lines(path.read_bytes())] if path.exists() else []
    events = [line for line in lines if line and line.get("event") == "record_hole"]
    reported = {(str(event.get("file")), str(event.get("steps"))) for event in events}
    return [hole for hole in holes if hole.lines or (hole.file, ranges(hole.steps)) not in reported]


def ranges(numbers: Sequence[int]) -> str:
    """Increasing numbers as text: [1, 2, 3, 7] -> '1 to 3, 7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


def _missing(steps: Iterable[int], first: int, last: int) -> tuple[int, ...]:
    return tuple(sorted(set(range(first, last + 1)).difference(steps)))


def _hole_in_statistics(path: Path, step: int) -> Hole:
    """The steps that lack a statistic, between the first and the last step that has one.

    Before and after there may have been a law without statistic: a run that resumes may change its law.
    """
    places = list_records(path)[0] if path.exists() else []
    steps = [place.step for place in places if place.step <= step]
    return Hole(STATISTICS, (), _missing(steps, min(steps), max(steps)) if steps else ())
