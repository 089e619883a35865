"""Which numbers of metrics.jsonl are curves, and the lines as rows of a table of curves."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from workers.record.record_lines import Line, is_sound, parse_line

PER_LAYER = "max_vio_batch_per_layer"
PHASES = ("dispatch_s", "experts_s", "combine_s", "bias_update_s", "control_wait_s")
REST = "other_s"  # time of a step outside of its phases: attention, dense layers, gradients, optimizer
FIELDS = (
    "loss", "aux_loss", "z_loss", "lr", "grad_norm", "step_s", "tokens_per_s", "tflops_per_s", "mfu",
    "max_vio_batch", "max_vio_floor", "max_vio_computation_batch", "dead_experts", "bias_min", "bias_max",
    *PHASES, REST, "sent_bytes", "tokens_routed", "tokens_sent", "tokens_received", "tokens_returned", "bias_version",
    "val_loss", "val_bits_per_byte", "max_vio_global", "max_vio_held_out", "max_vio_held_out_in_mix", "eval_s",
)  # fmt: skip
MAX_OWN_METRICS = 32  # numbers that are not in FIELDS: metrics that the user added (docs/how-to-add.md)
MAX_NAME_CHARACTERS = 63
MAX_LAYERS = 512
_MAX_NUMBER = 1e300
_NOT_CURVES = {"step", "time", "kind"}


class Table(NamedTuple):
    """n lines in the order of their steps. steps: (n,). values: (n, S), NaN where a line lacks a number."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Curves(NamedTuple):
    """The curves of a run: FIELDS, then the user's own metrics, then MaxVio of each MoE layer."""

    own_metrics: tuple[str, ...]
    num_layers: int

    @classmethod
    def in_lines(cls, lines: Iterable[Line]) -> "Curves":
        """The curves of these lines: their numbers that are not in FIELDS are the own metrics."""
        own: dict[str, None] = {}  # a set that keeps the order
        num_layers = 0
        for line in lines:
            own |= dict.fromkeys(name for name, value in line.items() if is_number(value) and _is_own(name))
            if isinstance(each := line.get(PER_LAYER), list):
                num_layers = max(num_layers, len(each))
        return cls(tuple(own)[:MAX_OWN_METRICS], min(num_layers, MAX_LAYERS))

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the columns; a layer's as `max_vio_batch_per_layer.0`."""
        return (*FIELDS, *self.own_metrics, *(f"{PER_LAYER}.{layer}" for layer in range(self.num_layers)))

    def table(self, lines: Sequence[Line]) -> Table:
        """The lines as rows."""
        values = np.array([self._row(line) for line in lines], np.float64)
        return Table(_steps(lines), values.reshape(len(lines), len(self.names)))

    def _row(self, line: Line) -> list[float]:
        row = [_float(line.get(name)) for name in (*FIELDS, *self.own_metrics)]
        row[_REST_COLUMN] = rest_s(line)
        layers = line.get(PER_LAYER)
        values = [_float(value) for value in layers[: self.num_layers]] if isinstance(layers, list) else []
        return row + values + [math.nan] * (self.num_layers - len(values))


_REST_COLUMN = FIELDS.index(REST)


def table_of(lines: Sequence[Line], names: Sequence[str]) -> Table:
    """The lines as rows of the named curves only."""
    values = np.array([[_value(line, name) for name in names] for line in lines], np.float64)
    return Table(_steps(lines), values.reshape(len(lines), len(names)))


def _steps(lines: Sequence[Line]) -> NDArray[np.int64]:
    return np.fromiter((line["step"] for line in lines), np.int64, len(lines))


def _is_own(name: str) -> bool:
    """Whether a number of this name is a user's own metric. With "," a request could not name it (`askCurves`)."""
    is_known = name in FIELDS or name in _NOT_CURVES or name.startswith(PER_LAYER)
    return not is_known and "," not in name and len(name) <= MAX_NAME_CHARACTERS


def _value(line: Line, name: str) -> float:
    if name == REST:
        return rest_s(line)
    layers = line.get(PER_LAYER) if name.startswith(f"{PER_LAYER}.") else None
    if not isinstance(layers, list):
        return _float(line.get(name))
    layer = int(name.removeprefix(f"{PER_LAYER}."))
    return _float(layers[layer]) if layer < len(layers) else math.nan


def parsed(text: bytes) -> Line | None:
    """A line of metrics.jsonl; None where it is damaged."""
    line = parse_line(text)
    return line if line is not None and is_sound(line) and is_number(line.get("time")) else None


def parsed_all(texts: Iterable[bytes]) -> list[Line]:
    """The lines that are sound."""
    return [line for text in texts if (line := parsed(text)) is not None]


def slim(line: Line) -> Line:
    """The numbers and booleans of a line, without its lists and texts."""
    return {name: value for name, value in line.items() if isinstance(value, bool) or is_number(value)}


def pace_s(recent: Sequence[Line]) -> float | None:
    """Mean seconds from step to step, with the evaluations and checkpoints between; None for fewer than two steps."""
    # After a recovery steps are trained again: the gap back to the first of them is left out.
    gaps = [(after["time"] - before["time"], after["step"] - before["step"]) for before, after in pairwise(recent)]
    forward = [(seconds, steps) for seconds, steps in gaps if steps > 0 and seconds >= 0]
    return sum(seconds for seconds, _ in forward) / sum(steps for _, steps in forward) if forward else None


def rest_s(line: Line) -> float:
    """Seconds of the step outside of its phases; NaN if the line lacks one of them."""
    return _float(line.get("step_s")) - sum(_float(line.get(name)) for name in PHASES)


def is_number(value: Any) -> TypeGuard[float]:
    """True for an int or a float that can be drawn; False for a bool, NaN, infinity and what is larger than 1e300."""
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER


def _float(value: Any) -> float:
    return float(value) if is_number(value) else math.nan
