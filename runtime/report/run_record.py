"""A run as read from its directory, and its headline figures, for report.html and for the terminal."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dispatch.errors import InvalidValue
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.yaml_text import load_yaml, read_bounded
from runtime.terminal.quantities import duration, milliseconds, percent, short, three_digits
from workers.record.record_lines import Line
from workers.record.run_log import EVENTS, METRICS, LoadHistory, read_events, read_load_history, read_metrics

MAX_VIO_DEFINITION = "MaxVio = max(load) / mean(load) − 1 over the experts of a layer"
MAX_GAPS = 5  # listed by name
MAX_VIO_STEPS = 50  # the headline averages over this many last steps
ASSIGNMENT_FIELDS = ("tokens_routed", "tokens_sent", "tokens_received", "tokens_returned")
NUMBERS = (
    *ASSIGNMENT_FIELDS, "loss", "max_vio_batch", "max_vio_floor", "control_wait_s", "step_s", "tokens_per_s",
    "grad_norm", "dispatch_s", "experts_s", "combine_s", "bias_update_s", "val_loss", "val_bits_per_byte",
    "max_vio_global",
)  # fmt: skip
PARTS = {  # of a step: seconds of the training thread that do not overlap, so that they can be summed
    "experts_s": "experts",
    "dispatch_s": "dispatch",
    "combine_s": "combine",
    "bias_update_s": "bias update",
    "control_wait_s": "control wait",
}
EVENT_NUMBERS = {"recovered": ("step", "total_s"), "bias_repaired": ("step",)}  # fields of events that are needed
MAX_NUMBER = 2**53  # A larger count is damage. Sums over many steps of smaller ones fit into int64.


@dataclass(frozen=True)
class RunRecord:
    """All that a report needs of a run. Any part may be empty, as in a run that was stopped at once."""

    path: Path
    config: dict[str, Any]
    train: list[Line]
    evals: list[Line]
    events: list[Line]
    history: LoadHistory

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a run directory, also while the run goes on. Raises InvalidValue if there is none, or a damaged file."""
        path = Path(path)
        train, evals = read_metrics(path)
        for line in train + evals:
            _check_numbers(path, line)
        for event in (events := read_events(path)):
            for name in EVENT_NUMBERS.get(event["event"], ()):
                _check_number(path / EVENTS, f"{name} of an event {event['event']}", event.get(name))
        return cls(path, _read_config(path / CONFIG_FILE), train, evals, events, read_load_history(path))

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """The steps of the training lines."""
        return np.array([line["step"] for line in self.train], np.int64)

    @property
    def law(self) -> str:
        """Name of the balancing law, '' where the configuration does not say."""
        return str(self.config.get("balance", {}).get("law", ""))

    @property
    def has_moe(self) -> bool:
        """True where the model has experts at all."""
        return self.history.layout.total > 0

    @property
    def total_steps(self) -> int | None:
        """Steps that the run was to make."""
        steps = self.config.get("run", {}).get("steps")
        return steps if type(steps) is int else None

    @property
    def state(self) -> str:
        """The last event that began or ended the run: 'finished', 'interrupted', 'failed', or 'running'."""
        for event in reversed(self.events):
            if event["event"] in ("finished", "interrupted", "failed"):
                return str(event["event"])
            if event["event"] in ("started", "resumed"):
                break
        return "running"

    def column(self, field: str) -> NDArray[np.float64]:
        """A field of every training line; NaN where it is null or missing."""
        return floats(line.get(field) for line in self.train)

    @property
    def skipped_steps(self) -> list[int]:
        """Steps whose gradient was not finite."""
        return [line["step"] for line in self.train if line.get("skipped")]

    @cached_property
    def missing_steps(self) -> list[range]:
        """Steps before the last one that the metrics or the load history lack."""
        last = int(self.steps.max(initial=0))
        in_both = np.intersect1d(self.steps, self.history.steps)
        # If the run was killed between writing its two files, its last line has no record. That is not a gap.
        known = [0, *in_both[in_both < last].tolist(), last]
        return [range(before + 1, after) for before, after in pairwise(known) if after > before + 1]

    @property
    def recoveries(self) -> list[Line]:
        """The events of the recoveries that reached a next step."""
        return [event for event in self.events if event["event"] == "recovered"]

    @property
    def repaired_steps(self) -> set[int]:
        """Steps that some rank routed by a bias that was then repaired."""
        return {event["step"] for event in self.events if event["event"] == "bias_repaired"}


def _check_numbers(path: Path, line: Line) -> None:
    """Raise InvalidValue if a field that is drawn or summed is not a number, or is too large."""
    for name in NUMBERS:
        if line.get(name) is not None:
            field = f"{name} of step {line['step']}"
            _check_number(path / METRICS, field, line[name], is_count=name in ASSIGNMENT_FIELDS)
    if line["kind"] == "train" and not isinstance(line.get("max_vio_batch_per_layer"), list):
        raise InvalidValue(f"{path / METRICS} is damaged: step {line['step']} has no list max_vio_batch_per_layer")


def _check_number(file: Path, name: str, value: Any, *, is_count: bool = False) -> None:
    if type(value) not in ((int,) if is_count else (int, float)) or not abs(value) < MAX_NUMBER:
        raise InvalidValue(f"{file} is damaged: {name} is {value!r:.40}; restore it from a copy")


def _read_config(path: Path) -> dict[str, Any]:
    """The settings as sections; {} where the file is missing. Raises InvalidValue where it holds something else."""
    if not path.exists():
        return {}
    try:
        config = load_yaml(read_bounded(path)) or {}
    except (ValueError, OSError) as error:
        raise InvalidValue(
            f"{path} is damaged: {error}; restore it, or remove it to have a report without it"
        ) from error
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise InvalidValue(f"{path} is damaged: it must hold sections such as 'model:' with settings below them")
    return config


@dataclass(frozen=True)
class Headline:
    """One headline figure. verdict: True good, False bad, None where it is just a number."""

    label: str
    value: str
    note: str
    verdict: bool | None = None


def headlines(record: RunRecord) -> list[Headline]:
    """The figures that sum a run up, most important first."""
    figures = [_held_out(record)]
    if record.train and record.has_moe:
        figures += [_max_vio(record), _lost_tokens(record), _checksums(record), _control_wait(record)]
    if record.train:
        figures.append(_speed(record))
    if recoveries := record.recoveries:
        figures.append(_recoveries(recoveries))
    if skipped := record.skipped_steps:
        named = ", ".join(map(str, skipped[:MAX_GAPS])) + (", ..." if len(skipped) > MAX_GAPS else "")
        note = f"gradient not finite: weights and bias left as they were; step {named}"
        figures.append(Headline("Skipped steps", str(len(skipped)), note))
    return figures


def _held_out(record: RunRecord) -> Headline:
    label = "Held-out bits per byte"
    if not record.evals:
        return Headline(label, "n/a", "the run was not evaluated")
    first, last = record.evals[0], record.evals[-1]
    value, before = _number(last["val_bits_per_byte"]), _number(first["val_bits_per_byte"])
    loss = f"loss {_number(last['val_loss']):.3f} nats/token"
    if first is last:
        return Headline(label, f"{value:.3f}", f"at step {last['step']}; {loss}")
    note = f"step {first['step']} → {last['step']}; {loss}"
    return Headline(label, f"{before:.2f} → {value:.2f}", note, verdict=value < before)


def _max_vio(record: RunRecord) -> Headline:
    """No verdict: what is good depends on the floor, the data and the law."""
    last = record.column("max_vio_batch")[-MAX_VIO_STEPS:]
    floor = record.column("max_vio_floor")[-MAX_VIO_STEPS:]
    span = f"last {len(last)} steps" if len(last) > 1 else "only step"
    note = f"mean of the {span} and all layers; floor by chance {three_digits(_mean(floor))}"
    note += f"; first step {three_digits(record.column('max_vio_batch')[0])}"
    if record.evals and (overall := record.evals[-1].get("max_vio_global")) is not None:
        note += f"; MaxVio_global {three_digits(overall)}"
    return Headline("MaxVio_batch", three_digits(_mean(last)), note)


def _lost_tokens(record: RunRecord) -> Headline:
    counts = np.array([[line.get(field) or 0 for field in ASSIGNMENT_FIELDS] for line in record.train], np.int64)
    lost = counts.max(1) - counts.min(1)
    missing = record.missing_steps
    gap = ""
    if missing:
        shown = [f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}" for part in missing[:MAX_GAPS]]
        gap = f"; the record lacks {sum(map(len, missing)):,} steps: {', '.join(shown)}"
        gap += ", ..." if len(missing) > MAX_GAPS else ""
    if not lost.any():
        total = f"{counts[:, 0].sum():,} (token, expert) assignments"
        steps = f"all {len(lost)} steps" if not missing else f"the {len(lost)} recorded steps"
        note = f"of {total}: routed = sent = received = returned on {steps}{gap}"
        return Headline("Tokens lost", "0", note, verdict=bool(counts.all()) and not missing)
    first = record.steps[lost > 0][0]
    note = f"assignments; the counts differ on {(lost > 0).sum()} of {len(lost)} steps, first at step {first}{gap}"
    return Headline("Tokens lost", f"{lost.sum():,}", note, verdict=False)


def _checksums(record: RunRecord) -> Headline:
    """Compare the recorded bias of each step with the logged checksum, which every rank verified before the step."""
    recorded = {int(step): bias for step, bias in zip(record.history.steps, record.history.bias, strict=True)}
    # If the run was killed between writing its two files, the bias of its last line was not recorded.
    lines = [line for line in record.train if line["step"] <= max(recorded, default=0)]
    wrong = [
        line["step"]
        for line in lines
        if (bias := recorded.get(line["step"])) is None
        or line.get("bias_checksum") != f"{zlib.crc32(bias):08x}"
        or line["step"] in record.repaired_steps
    ]
    value = f"{len(lines) - len(wrong)} of {len(lines)} steps"
    if wrong:
        repaired = wrong[0] in record.repaired_steps
        cause = "a rank routed by another bias" if repaired else "the checksum is not that of the recorded bias"
        note = f"{cause}, first at step {wrong[0]}"
        return Headline("Bias checksums equal", value, note, verdict=False)
    return Headline("Bias checksums equal", value, "on all ranks, and crc32 of the recorded bias", bool(lines))


def _control_wait(record: RunRecord) -> Headline:
    wait, step = record.column("control_wait_s"), record.column("step_s")
    note = f"of the step: {milliseconds(_mean(wait))} of {milliseconds(_mean(step))}, mean"
    if (known := wait[np.isfinite(wait)]).size:  # On a busy machine a few long waits dominate the mean.
        note += f"; median {milliseconds(float(np.median(known)))}, worst {milliseconds(float(known.max()))}"
    return Headline("Waiting for the coordinator", percent(_mean(wait) / _mean(step)), note)


def _speed(record: RunRecord) -> Headline:
    speed, step = np.nanmedian(record.column("tokens_per_s")), np.nanmedian(record.column("step_s"))
    note = f"median; {milliseconds(float(step))} a step, {duration(float(np.nansum(record.column('step_s'))))} in all"
    if np.isfinite(work := record.column("tflops_per_s")).any():
        note += f"; {three_digits(float(np.nanmedian(work)))} TFLOP/s a rank"
    if np.isfinite(mfu := record.column("mfu")).any():
        note += f", {percent(float(np.nanmedian(mfu)))} of its device's peak (MFU)"
    return Headline("Tokens per second", short(float(speed)), note)


def phase_shares(record: RunRecord) -> list[tuple[str, float, float]]:
    """For each part of a step, and for all else: its label, mean seconds, and share of the time of all steps."""
    whole = float(np.nansum(record.column("step_s")))
    if not whole:
        return []
    spent = {label: float(np.nansum(record.column(field))) for field, label in PARTS.items()}
    spent["everything else"] = max(0.0, whole - sum(spent.values()))
    return [(label, seconds / len(record.train), seconds / whole) for label, seconds in spent.items()]


def _recoveries(recoveries: list[Line]) -> Headline:
    seconds = [event["total_s"] for event in recoveries]
    steps = ", ".join(str(event["step"]) for event in recoveries[-5:])
    note = f"median {duration(float(np.median(seconds)))} from the failure to the next step; went on at step {steps}"
    return Headline("Recoveries", str(len(recoveries)), note)


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of the values that are numbers; NaN, without a warning, if there is none."""
    numbers = values[np.isfinite(values)]
    return float(numbers.mean()) if numbers.size else float("nan")


def floats(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Numbers of a metrics field; NaN for null."""
    return np.array([_number(value) for value in values], np.float64)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def clip(name: str) -> str:
    """Shorten a name so that it fits into a legend."""
    return name if len(name) <= 18 else f"{name[:17]}…"
