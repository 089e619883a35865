"""Results as a table for the terminal, as Markdown for documents and as a line of JSON."""

import statistics
from typing import Any

from benchmarks.peers.case import Case
from benchmarks.peers.race import LIMIT, Entry, Outcome

OURS = "trimtab"
MIB = 2**20
NOTE = (
    "The peers are GPU libraries: their CPU paths are not tuned, and megatron runs through a shim. "
    "`x limit` is the median over the rounds of the time over that of the bare matmuls of the same work, `x ours` over "
    "that of trimtab. CPU is a rank's, in all its threads; memory is the largest of the ranks, above weights and "
    "inputs, with what a layer keeps between steps: what torch's allocator handed out at most, and peak RSS. Wire is "
    "what a rank hands to others. Error is the largest relative error of output and gradients against an fp32 loop."
)
HEADER = [
    "layer", "wall ms", "x limit", "x ours", "CPU ms", "x limit", "MiB handed out", "MiB RSS", "MiB wire", "error",
]  # fmt: skip


def outcome_from_json(values: dict[str, Any]) -> Outcome:
    """Read what `dataclasses.asdict` made of an outcome."""
    return Outcome(values["hottest_over_mean"], {name: Entry(**entry) for name, entry in values["entries"].items()})


def summary(outcome: Outcome) -> dict[str, dict[str, float]]:
    """The medians of every layer that raced, by name: what the tables show, unrounded."""
    return {name: _figures(outcome, name) for name, entry in outcome.entries.items() if entry.reason is None}


def as_text(case: Case, outcome: Outcome, versions: dict[str, str]) -> str:
    """A table with aligned columns, and a line for each layer that did not race."""
    rows = _rows(outcome, versions)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths) for row in rows]
    return "\n".join([_heading(case, outcome), *lines, *_absences(outcome, versions)])


def as_markdown(case: Case, outcome: Outcome, versions: dict[str, str]) -> str:
    """The same as a section of a document."""
    header, *rows = (f"| {' | '.join(row)} |" for row in _rows(outcome, versions))
    rule = "|" + " --- |" + " ---: |" * (len(HEADER) - 1)
    absences = [f"- {line}" for line in _absences(outcome, versions)]
    return "\n".join([f"### {_heading(case, outcome)}", "", header, rule, *rows, "", *absences]) + "\n"


def _heading(case: Case, outcome: Outcome) -> str:
    return f"{case.title} (busiest expert {outcome.hottest_over_mean:.2f} x mean, {case.rounds} rounds)"


def _figures(outcome: Outcome, name: str) -> dict[str, float]:
    entry = outcome.entries[name]
    figures = {
        "wall_s": statistics.median(entry.wall_s),
        "wall_over_limit": outcome.median_ratio(name, LIMIT),
        "cpu_s": statistics.median(entry.cpu_s),
        "cpu_over_limit": outcome.median_ratio(name, LIMIT, "cpu_s"),
        "allocated_mib": entry.allocated_bytes / MIB,
        "resident_mib": entry.resident_bytes / MIB,
        "wire_mib": entry.wire_bytes / MIB,
    }
    if OURS in outcome.entries and outcome.entries[OURS].reason is None:
        figures["wall_over_ours"] = outcome.median_ratio(name, OURS)
    if entry.errors:
        figures["error"] = max(entry.errors.values())
    return figures


def _rows(outcome: Outcome, versions: dict[str, str]) -> list[list[str]]:
    return [HEADER] + [[_labelled(name, versions), *_cells(figures)] for name, figures in summary(outcome).items()]


def _cells(figures: dict[str, float]) -> list[str]:
    columns = {
        "wall_s": _milliseconds,
        "wall_over_limit": "{:.2f}".format,
        "wall_over_ours": "{:.2f}".format,
        "cpu_s": _milliseconds,
        "cpu_over_limit": "{:.2f}".format,
        "allocated_mib": "{:.0f}".format,
        "resident_mib": "{:.0f}".format,
        "wire_mib": "{:.1f}".format,
        "error": "{:.0e}".format,
    }
    return [show(figures[name]) if name in figures else "" for name, show in columns.items()]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _absences(outcome: Outcome, versions: dict[str, str]) -> list[str]:
    return [
        f"{_labelled(name, versions)} did not race: {entry.reason}"
        for name, entry in outcome.entries.items()
        if entry.reason is not None
    ]


def _labelled(name: str, versions: dict[str, str]) -> str:
    return f"{name} {versions.get(name, '')}".rstrip()


def _aligned(row: list[str], widths: list[int]) -> str:
    name, *figures = row
    padded = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
    return "  ".join([name.ljust(widths[0]), *padded]).rstrip()
