"""The lines of metrics.jsonl and events.jsonl, and which of them a run that resumes keeps. Needs no torch."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

Line = dict[str, Any]

MAX_STEP = 2**53  # no run makes more, and readers of JSON in other languages have no larger exact number


class SortedLines(NamedTuple):
    """Lines of metrics.jsonl up to a step.

    kept: start and stop of each line to keep, in bytes. bad: numbers of the lines that are damaged or out of order and
    that matter: kept lines follow, or steps are missing. steps: the training steps among the kept lines.
    """

    kept: list[tuple[int, int]]
    bad: list[int]
    steps: set[int]


def complete_lines(raw: bytes) -> Iterator[tuple[int, Line | None]]:
    """Offset and JSON object of each line; None for a line without one. A last line without a newline is left out."""
    offset = 0
    for text in raw.split(b"\n")[:-1]:
        yield offset, parse_line(text)
        offset += len(text) + 1


def parse_line(text: bytes) -> Line | None:
    """The JSON object in a line; None if the line holds anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def is_sound(line: Line) -> bool:
    """Whether a line of metrics.jsonl has a known kind and a valid step."""
    step = line.get("step")
    return line.get("kind") in ("train", "eval") and type(step) is int and 0 <= step <= MAX_STEP


def sort_lines(raw: bytes, step: int) -> SortedLines:
    """Which lines of metrics.jsonl belong to the steps up to `step`."""
    kept: list[tuple[int, int]] = []
    bad: list[int] = []
    late: list[int] = []  # lines of steps after `step`; a kept line after them shows that they are out of order
    steps: set[int] = set()
    newest, last_kept = 0, 0
    for number, (offset, line) in enumerate(complete_lines(raw), 1):
        if line is None or not is_sound(line) or _is_out_of_order(line, newest, steps):
            bad.append(number)
        elif line["step"] > step:
            late.append(number)
        else:
            bad, late = bad + late, []
            newest, last_kept = line["step"], number
            kept.append((offset, raw.index(b"\n", offset) + 1))
            if line["kind"] == "train":
                steps.add(line["step"])
    is_short = len(steps) < step
    return SortedLines(kept, sorted(number for number in bad if number < last_kept or is_short), steps)


def _is_out_of_order(line: Line, newest: int, steps: set[int]) -> bool:
    return line["step"] < newest or (line["kind"] == "train" and line["step"] in steps)
