"""Compares the record of a run with that of an undisturbed one: steps, evaluations, samples, loads and statistics."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.commands.chaos.record import Record, Stored
from runtime.report.run_record import ASSIGNMENT_FIELDS

Line = Mapping[str, Any]


def flaws(found: Record, calm: Record, num_assignments: int, *, ended: bool) -> dict[str, str]:
    """How a record differs from that of the undisturbed run: a sentence for each place. Empty: it does not.

    All but times is compared bit for bit, steps that were repeated too. No step may be missing or there twice.

    Args:
        num_assignments: (token, expert) pairs of each step.
        ended: the run has ended: its record must be as long as the other one.
    """
    problems = dict.fromkeys(found.damage, "it was whole when it was written")
    ours = (*found.superseded_lines, *found.lines, *found.superseded_samples, *found.samples)
    theirs = (*calm.lines, *calm.samples)
    for kind, name in (("train", "step"), ("eval", "evaluation after step"), ("sample", "samples after step")):
        differing = differences(*([line for line in each if line["kind"] == kind] for each in (ours, theirs)))
        problems |= {f"{name} {step}": text for step, text in differing.items()}
    problems |= dict(_wrong_counts(found, num_assignments))
    for name, stored, superseded, expected in (
        ("history.bin", found.loads, found.superseded_loads, calm.loads),
        ("statistics.bin", found.statistics, found.superseded_statistics, calm.statistics),
    ):
        problems |= dict(_differing_records(name, (*superseded, *stored), dict(expected)))
    return problems | dict(_wrong_orders(found, calm, ended))


def differences(lines: Iterable[Line], calm: Iterable[Line]) -> dict[int, str]:
    """The first field in which a line differs from the calm run's of the same step, by step.

    Fields of time are left out, all others are compared bit for bit: losses, norms, loads, bias, tokens.
    """
    expected = {_place(line): line for line in calm}
    found = {}
    for line in lines:
        step, other = line["step"], expected.get(_place(line))
        if other is None:
            found[step] = "the calm run has no such step"
        elif name := _first_difference(line, other):
            found[step] = f"{name} is {line.get(name)}, in the calm run {other.get(name)}"
    return found


def _place(line: Line) -> tuple[int, int | None]:
    """The step, and which of its samples it is."""
    return line["step"], line.get("sample")


def _first_difference(line: Line, calm: Line) -> str | None:
    names = [name for name in line.keys() | calm.keys() if name not in ("time", "mfu") and not name.endswith("_s")]
    return next((name for name in sorted(names) if line.get(name) != calm.get(name)), None)


def _wrong_counts(found: Record, num_assignments: int) -> Iterator[tuple[str, str]]:
    """Steps with more or fewer assignments than the batch has. A comparison would miss what both runs do wrong."""
    for line in (*found.superseded_lines, *found.lines):
        if line["kind"] == "train" and (
            wrong := [name for name in ASSIGNMENT_FIELDS if line.get(name) != num_assignments]
        ):
            yield f"step {line['step']}", f"{wrong[0]} is {line.get(wrong[0])}, and the batch has {num_assignments}"
    for step, raw in (*found.superseded_loads, *found.loads):
        # The counts: behind 8 bytes of step, 8 of the 12 bytes that a record has for each expert.
        num_counted = int(np.frombuffer(raw, "<i8", (len(raw) - 8) // 12, 8).sum())
        if num_counted != num_assignments:
            yield f"history.bin, step {step}", f"it counts {num_counted}, and the batch has {num_assignments}"


def _differing_records(
    name: str, stored: Iterable[tuple[int, bytes]], expected: Mapping[int, bytes]
) -> Iterator[tuple[str, str]]:
    for step, raw in stored:
        if raw != expected.get(step):
            yield f"{name}, step {step}", "the record is not that of the calm run"


def _wrong_orders(found: Record, calm: Record, ended: bool) -> Iterator[tuple[str, str]]:
    """Steps that are missing, repeated or out of order; and a file that ends before the others do."""
    lines = [(line["kind"], line["step"]) for line in found.lines]
    # A run that goes on writes its line first, then the load, then the statistic.
    last_step = max((step for kind, step in lines if kind == "train"), default=0) - 1
    if text := _disorder(lines, [(line["kind"], line["step"]) for line in calm.lines], 0, ended):
        yield "order of metrics.jsonl", text
    last_eval = max((step for kind, step in lines if kind == "eval"), default=0)
    samples, owed = (
        [(f"sample {line.get('sample')} of step", line["step"]) for line in each.samples] for each in (found, calm)
    )
    if text := _disorder(samples, owed, sum(step < last_eval for _, step in owed), ended):
        yield "order of samples.jsonl", text
    for name, stored, expected in (
        ("history.bin", found.loads, calm.loads),
        ("statistics.bin", found.statistics, calm.statistics),
    ):
        if text := _disorder(_steps(stored), _steps(expected), min(last_step, len(expected)), ended):
            yield f"order of {name}", text


def _steps(stored: Stored) -> list[tuple[str, int]]:
    return [("step", step) for step, _ in stored]


def _disorder(
    found: Sequence[tuple[str, int]], expected: Sequence[tuple[str, int]], num_owed: int, ended: bool
) -> str | None:
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=False), 1):
        if ours != theirs:
            return f"{ours[0]} {ours[1]} is at place {place}, where {theirs[0]} {theirs[1]} belongs"
    if len(found) > len(expected):
        return f"{found[len(expected)][0]} {found[len(expected)][1]} is behind the end"
    if len(found) < (len(expected) if ended else num_owed):
        return f"{expected[len(found)][0]} {expected[len(found)][1]} is missing, and what follows it"
    return None
