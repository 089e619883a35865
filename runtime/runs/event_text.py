"""Events of a run as text, for the terminal and the report, with rounded figures and units."""

import json
import string
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from runtime.terminal.quantities import byte_size, duration, milliseconds, three_digits

# The clauses of each kind of event. A clause is left out if the event lacks one of its fields. Fields that occur in no
# clause are added at the end, as "name value"; only those in _UNSAID are hidden.
_CLAUSES: dict[str, tuple[str, ...]] = {
    "started": (
        "step {step}",
        "{rank_map}",
        "{exchange}",
        "{balance}",
        "Ray was up after {ray_s}, the workers {gang_s} later",
    ),
    "checkpoint": (
        "step {step}",
        "{from_memory}",
        "{bytes} written in {write_s}",
        "training stood still for {blocked_s}",
    ),
    "checkpoint_failed": ("step {step}", "{reason}"),
    "checkpoint_waits": ("step {step}", "{reason}", "trying again for {for_s}"),
    "checkpoints_removed": ("steps {removed}, to make room for step {step}", "{missing_bytes} were missing"),
    "memory_checkpoints": (
        "from step {step} on, each worker keeps {bytes} in memory, and sends {sent_bytes} of it to its partner",
    ),
    "memory_checkpoint_failed": ("{reason}",),
    "memory_checkpoint_unusable": ("step {step}", "{reason}"),
    "finished": (
        "step {step}",
        "saved at step {saved_step}",
        "training stood still for {checkpoint_blocked_s} in checkpoints",
        "for {memory_checkpoint_blocked_s} in those in memory",
    ),
    "warning": ("{text}",),
    "coordinator_lost": ("at step {step}, rank 0 goes on with the same law by itself", "{reason}"),
    "coordinator_back": ("at step {step}, lost since step {lost_since_step}",),
    "copies_placed": (
        "after step {step}, {num_copies} copies of hot experts",
        "busiest rank {before} of the mean before, {after} with them",
    ),
    "bias_repaired": ("at step {step}, on rank {ranks}",),
    "failed": ("{reason}", "rank {rank} on {node}, pid {pid}", "cause: {cause}"),
    "gave_up": ("{reason}",),
    "recovering": ("with {workers} of {workers_before} workers", "after a pause of {back_off_s}"),
    "recovered": ("step {step} after {total_s}", "{seconds}"),
    "moving": ("from {workers_before} to {workers} workers", "{reason}"),
    "record_hole": ("{file}", "damaged lines {lines}", "missing steps {steps}"),
    "imported": ("{architecture} from {source}",),
    "initialised": ("with the weights of {source}", "optim.lr {lr}"),
}
_CLAUSES["resumed"] = (*_CLAUSES["started"], "read in {load_s}")
_CLAUSES["interrupted"] = _CLAUSES["finished"]
# Hidden because other text says it: the path of a checkpoint follows from its step, the kind and the cause from the
# reason; docs/recovery.md describes the partner of a worker.
_UNSAID = {
    "checkpoint": {"path"},
    "memory_checkpoints": {"partner_shift"},
    "failed": {"kind"},
    "coordinator_lost": {"cause"},
}
# Text for a field that is true.
_FLAGS = {"from_memory": "from the workers' memory"}
# Fields of many lines, which the report folds. `trace` is that of a bug: the terminal shows it. `diagnosis` describes a
# failure: the terminal leaves it out, since an error that ends the run is printed at the end.
STACKS = ("diagnosis", "trace")
_COMMON_FIELDS = {"time", "event", *STACKS}


def event_text(line: Mapping[str, Any]) -> str:
    """The text of an event, without its kind and time. An event that no run of ours writes is shown as JSON."""
    try:
        return _words(line)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError):
        return json.dumps({name: value for name, value in line.items() if name not in STACKS}, default=str)


def _words(line: Mapping[str, Any]) -> str:
    kind, covered, clauses = str(line["event"]), set[str](), list[str]()
    for clause in _CLAUSES.get(kind, ()):
        fields = {name for _, name, _, _ in string.Formatter().parse(clause) if name}
        if all(line.get(name) is not None for name in fields):
            clauses.append(clause.format_map({name: _shown(name, line[name]) for name in fields}))
        covered |= fields
    rest = [name for name in line if name not in covered | _UNSAID.get(kind, set()) | _COMMON_FIELDS]
    return "; ".join([*clauses, *(f"{name.replace('_', ' ')} {_shown(name, line[name])}" for name in rest)])


def event_line(line: Mapping[str, Any]) -> str:
    """An event with its kind, as a line for the terminal; the trace of a bug follows."""
    text = f"{str(line['event']).replace('_', ' ')}: {event_text(line)}"
    return f"{text}\n{line['trace'].rstrip()}" if line.get("trace") else text


def _shown(name: str, value: Any) -> str:
    if value is True and name in _FLAGS:
        return _FLAGS[name]
    if isinstance(value, Mapping):
        return _SECTION_TEXTS[name](value) if name in _SECTION_TEXTS else _pairs(value, in_seconds=name == "seconds")
    if isinstance(value, list | tuple):
        is_map = name == "rank_map" and value and isinstance(value[0], Mapping)
        return _ranks(value) if is_map else ", ".join(_shown(name, each) for each in value)
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return _number(name, value) if is_number else str(value)


def _pairs(values: Mapping[str, Any], *, in_seconds: bool) -> str:
    return ", ".join(f"{name} {_shown('_s' if in_seconds else name, value)}" for name, value in values.items())


def _law(values: Mapping[str, Any]) -> str:
    rate = values.get("rate")
    return f"law {values['law']}" + ("" if rate is None else f" with rate {rate:g}")


_SECTION_TEXTS = {"exchange": "exchange {exchange} ({reason})".format_map, "balance": _law}


def _number(name: str, value: Any) -> str:
    if name.endswith("_s"):
        return milliseconds(value) if value < 60 else duration(value)
    if name.endswith("bytes"):
        return byte_size(value)
    return three_digits(value) if isinstance(value, float) else str(value)


def _ranks(rows: Sequence[Mapping[str, Any]]) -> str:
    """The nodes of the ranks; neighbouring ranks on one node are one item."""
    parts = []
    for node, neighbours in groupby(rows, lambda row: row["node"]):
        node_rows = list(neighbours)
        first, last = node_rows[0]["rank"], node_rows[-1]["rank"]
        devices = ", ".join(dict.fromkeys(str(row["device"]) for row in node_rows))
        who = f"rank {first}" if first == last else f"ranks {first} to {last}"
        parts.append(f"{who} on {node} ({devices})")
    return ", ".join(parts)
