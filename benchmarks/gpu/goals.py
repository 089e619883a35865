"""The goals that a device can show, and whether what was measured meets them. They are for one H100 of 80 GB."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.layer import OURS, TITAN_COMPILED
from benchmarks.gpu.section import Figures

# docs/performance.md, "One command for a GPU", has them with what was measured on an H100 before.
LAYER_TFLOPS = {"qwen3": 440.0, "olmoe": 440.0, "dsv3-ep8": 560.0, "paper-1b": 250.0}
AHEAD_OF_TORCHTITAN = 1.2
TRAINING_TOKENS_PER_S = 280_000.0
TRAINING_PEAK_GIB = 51.0
DECODING_TOKENS_PER_S = 5 * 104.0
SAVE_OVER_PLAIN = 1.5
SCRIPT_S = 300.0


@dataclass(frozen=True)
class Goal:
    """One line of the table. met: None where it was not measured."""

    text: str
    required: str
    measured: str
    met: bool | None


def judge(found: Figures) -> list[Goal]:
    """All goals, by the JSON of a run."""
    sections = {name: outcome["figures"] for name, outcome in found["sections"].items()}
    checks = sections.get("checks", {})
    goals = [
        *(_check(checks, name) for name in ("pytest -m gpu", *(f"parity in {d}" for d in ("float64", "float32")))),
        _check(checks, "parity in bfloat16"),
        *_layer_goals(sections.get("layer", {})),
        *_training_goals(sections.get("training", {}), sections.get("profile", {})),
        *_decoding_goals(sections.get("decoding", {})),
        *_checkpoint_goals(sections.get("checkpoint", {})),
        *_dispatch_goals(sections.get("dispatch", {})),
        _at_most("the whole script, s", SCRIPT_S, found.get("seconds"), "{:.0f}"),
    ]
    return goals


def _check(checks: Figures, name: str) -> Goal:
    if name not in checks:
        return Goal(name, "passes", "not measured", None)
    passed: bool = checks[name]["passed"]
    return Goal(name, "passes", "passed" if passed else "failed", passed)


def _layer_goals(layers: Figures) -> Iterator[Goal]:
    for name, required in LAYER_TFLOPS.items():
        contestants = layers.get(name, {}).get("contestants", {})
        ours, titan = contestants.get(OURS, {}), contestants.get(TITAN_COMPILED, {})
        yield _at_least(f"layer at {name}, TFLOP/s", required, ours.get("tflops"))
        ahead = 1 / titan["ours_over_it"] if "ours_over_it" in titan else None
        text = f"layer at {name}, times as fast as compiled torchtitan"
        yield _at_least(text, AHEAD_OF_TORCHTITAN, ahead, "{:.2f}")
        peaks = (each.get("peak_mib") or None for each in (titan, ours))
        yield _at_most(f"layer at {name}, MiB, compiled torchtitan's", *peaks)


def _training_goals(training: Figures, profile: Figures) -> Iterator[Goal]:
    yield _at_least("training of paper-1b, tokens/s", TRAINING_TOKENS_PER_S, training.get("tokens_per_s"), "{:,.0f}")
    peak = profile["peak_mib"] / 1024 if "peak_mib" in profile else None
    yield _at_most("training of paper-1b, GiB at most", TRAINING_PEAK_GIB, peak, "{:.1f}")


def _decoding_goals(decoding: Figures) -> Iterator[Goal]:
    rates = {dtype: found["tokens_per_s"] for dtype, found in decoding.items()}
    yield _at_least("decoding one prompt in fp32, tokens/s", DECODING_TOKENS_PER_S, rates.get("float32"))
    yield _at_least("decoding one prompt in bf16, tokens/s, fp32's", rates.get("float32"), rates.get("bfloat16"))


def _checkpoint_goals(checkpoint: Figures) -> Iterator[Goal]:
    ratios = sorted(checkpoint.get("save_over_plain", []))
    middle = ratios[len(ratios) // 2] if ratios else None
    yield _at_most("a checkpoint, times a plain write with fsync", SAVE_OVER_PLAIN, middle, "{:.2f}")
    copy = checkpoint.get("copy", {})
    yield _at_most("a checkpoint stops training, s, the copy's", copy.get("arrived_s"), copy.get("stopped_s"), "{:.3f}")


def _dispatch_goals(dispatch: Figures) -> Iterator[Goal]:
    ratios = [wall["ratio"] for wall in dispatch.get("walls", {}).values()]
    fastest = min(ratios) if ratios else None
    yield _at_least("bench dispatch, layer in multiples of its limit", 1.0, fastest, "{:.2f}")


def _at_least(text: str, required: float | None, measured: float | None, shape: str = "{:.0f}") -> Goal:
    return _compared(text, "≥", required, measured, shape, lambda value, bound: value >= bound)


def _at_most(text: str, required: float | None, measured: float | None, shape: str = "{:.0f}") -> Goal:
    return _compared(text, "≤", required, measured, shape, lambda value, bound: value <= bound)


def _compared(
    text: str,
    sign: str,
    required: float | None,
    measured: float | None,
    shape: str,
    holds: Callable[[Any, Any], bool],
) -> Goal:
    bound = f"{sign} {shape.format(required)}" if required is not None else "not measured"
    value = shape.format(measured) if measured is not None else "not measured"
    met = None if required is None or measured is None else holds(measured, required)
    return Goal(text, bound, value, met)
