"""The page for Prometheus: the latest numbers of every run, under stable names that docs/watch.md lists."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.watch.watched_run import WatchedRun

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("not begun", "starting", "running", "recovering", "finished", "interrupted", "failed", "gone")

# Name, kind, help, and the keys of the value in `WatchedRun.summary`.
_VALUES = (
    ("step", "gauge", "Optimizer steps made.", ("step",)),
    ("total_steps", "gauge", "Optimizer steps that the run is to make.", ("total_steps",)),
    ("left_seconds", "gauge", "Estimated seconds until the last step.", ("left_s",)),
    ("last_written_timestamp_seconds", "gauge", "Unix time of the last step or event.", ("last_time",)),
    ("loss", "gauge", "Mean cross-entropy of the last step, nats per token.", ("latest", "loss")),
    ("held_out_bits_per_byte", "gauge", "Of the last evaluation.", ("last_eval", "val_bits_per_byte")),
    ("learning_rate", "gauge", "Of the last step.", ("latest", "lr")),
    ("gradient_norm", "gauge", "Of the last step, before clipping.", ("latest", "grad_norm")),
    ("step_seconds", "gauge", "Duration of the last step.", ("latest", "step_s")),
    ("tokens_per_second", "gauge", "Of the last step, all ranks.", ("latest", "tokens_per_s")),
    ("model_flop_utilisation", "gauge", "Of the last step; 1 is the peak of the device.", ("latest", "mfu")),
    ("control_wait_seconds", "gauge", "Wait for the coordinator in the last step.", ("latest", "control_wait_s")),
    ("max_vio_batch", "gauge", "MaxVio of the last batch, mean over layers.", ("latest", "max_vio_batch")),
    ("max_vio_floor", "gauge", "MaxVio that chance alone would show.", ("latest", "max_vio_floor")),
    ("dead_experts", "gauge", "Experts without a token in the last step.", ("latest", "dead_experts")),
    ("recoveries_total", "counter", "Recoveries that reached a next step.", ("num_recoveries",)),
    ("failures_total", "counter", "Failures recorded.", ("num_failures",)),
)


def exposition(runs: Sequence[WatchedRun]) -> str:
    """The numbers of all runs in Prometheus' text format 0.0.4."""
    summaries = [run.summary() for run in runs]
    labels = [f'run="{_escaped(summary["name"])}",number="{number}"' for number, summary in enumerate(summaries)]
    pairs = list(zip(labels, summaries, strict=True))
    return "\n".join([*_values(pairs), *_states(pairs), ""])


def _values(pairs: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    for name, kind, help_text, keys in _VALUES:
        found = [(label, value) for label, summary in pairs if (value := _value_at(summary, keys)) is not None]
        if found:
            yield f"# HELP trimtab_{name} {help_text}"
            yield f"# TYPE trimtab_{name} {kind}"
            yield from (f"trimtab_{name}{{{label}}} {value!r}" for label, value in found)


def _states(pairs: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    yield "# HELP trimtab_state 1 for the state that the run is in."
    yield "# TYPE trimtab_state gauge"
    for label, summary in pairs:
        yield from (f'trimtab_state{{{label},state="{state}"}} {int(summary["state"] == state)}' for state in STATES)


def _value_at(summary: dict[str, Any], keys: tuple[str, ...]) -> float | int | None:
    value: Any = summary
    for name in keys:
        value = value.get(name) if isinstance(value, dict) else None
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
