"""Computes the numbers of every run of a comparison, and of every method over its seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.commands.compare.plan import ComparePlan
from runtime.report.run_record import floats
from workers.record.run_log import read_metrics

AVERAGED_STEPS = 5  # of MaxVio_batch, for the steps to balance and to recover: one step may be low by chance
LAST_SHARE = 0.1  # of the run: MaxVio at the end, and before the shift, is averaged over so many steps
FLOOR_FACTOR = 1.5  # as in `trimtab replay`

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class RunCurves:
    """What one finished run recorded at every step, and its last evaluation."""

    seed: int
    max_vio_batch: Curve
    max_vio_computation_batch: Curve
    step_s: Curve
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class SeedStats:
    """A measure over the seeds of a method.

    values: one for each seed, None where the run has none. std: of a sample, None where fewer than two are known.
    """

    values: tuple[float | None, ...]
    mean: float | None
    std: float | None

    @classmethod
    def over(cls, values: Sequence[float | None]) -> "SeedStats":
        """Compute the spread of the known values."""
        known = [value for value in values if value is not None]
        mean = statistics.fmean(known) if known else None
        return cls(tuple(values), mean, statistics.stdev(known) if len(known) > 1 else None)

    @property
    def num_known(self) -> int:
        """Runs that have a value."""
        return sum(value is not None for value in self.values)


@dataclass(frozen=True)
class MethodOutcome:
    """A row of the table. measures: by name, see `_measure`. against_first: bits per byte, seed by seed."""

    spec: str
    seeds: tuple[int, ...]
    measures: dict[str, SeedStats]
    per_source: dict[str, SeedStats]
    against_first: SeedStats
    curves: tuple[RunCurves, ...]


@dataclass(frozen=True)
class Outcome:
    """A whole comparison. shift_at: first step of the second mix, 0 without one. floor: see `practical_floor`."""

    methods: tuple[MethodOutcome, ...]
    steps: int
    shift_at: int
    threshold: float
    floor: float
    threshold_given: bool

    def to_json(self) -> dict[str, Any]:
        """All numbers, those of each run in the order of `seeds`."""
        rows = []
        for method in self.methods:
            row = asdict(method)
            del row["curves"]
            row["max_vio_batch_curves"] = [curves.max_vio_batch.tolist() for curves in method.curves]
            rows.append(row)
        values = {name: getattr(self, name) for name in ("steps", "shift_at", "threshold", "floor")}
        return {**values, "methods": rows}


def read_outcome(plan: ComparePlan, threshold: float | None) -> Outcome | None:
    """The numbers of all finished runs; None where there is none. Methods without a finished run are left out."""
    curves = {
        method: tuple(
            _read_run(plan.run_dir(key), key.seed)
            for key in plan.runs
            if key.method == method and plan.is_finished(key)
        )
        for method in plan.methods
    }
    found = {method: runs for method, runs in curves.items() if runs}
    if not found:
        return None
    shift_at = plan.base.data.shift_at if plan.base.data.shift_at <= plan.base.run.steps else 0
    floor = practical_floor(list(found.values()), shift_at)
    limit = FLOOR_FACTOR * floor if threshold is None else threshold
    first = next(iter(found.values()))
    methods = tuple(_method_outcome(method.spec, runs, first, shift_at, limit) for method, runs in found.items())
    return Outcome(methods, plan.base.run.steps, shift_at, limit, floor, threshold is not None)


def practical_floor(methods: Sequence[Sequence[RunCurves]], shift_at: int) -> float:
    """The lowest MaxVio_batch that any method reached: the mean over its seeds of the last tenth before the shift.

    It is far above the chance floor, which assumes that tokens choose independently of their neighbours.
    """
    return min(statistics.fmean(_settled(run.max_vio_batch, shift_at) for run in runs) for runs in methods)


def steps_until_below(curve: Curve, threshold: float) -> int | None:
    """Steps until the mean of the last AVERAGED_STEPS is below the threshold; at least AVERAGED_STEPS. None: never."""
    below = np.flatnonzero(_running_mean(curve) < threshold)
    return int(below[0]) + AVERAGED_STEPS if below.size else None


def _running_mean(curve: Curve) -> Curve:
    """Means of AVERAGED_STEPS steps in a row; empty for a shorter curve."""
    if len(curve) < AVERAGED_STEPS:
        return np.zeros(0)
    return np.convolve(curve, np.full(AVERAGED_STEPS, 1 / AVERAGED_STEPS), mode="valid")


def _read_run(run_dir: Path, seed: int) -> RunCurves:
    train, evals = read_metrics(run_dir)
    names = ("max_vio_batch", "max_vio_computation_batch", "step_s")
    vio, computation_vio, step_s = (floats(line[name] for line in train) for name in names)
    return RunCurves(seed, vio, computation_vio, step_s, evals[-1])


def _settled(curve: Curve, shift_at: int) -> float:
    """The mean of the last steps before the shift, or of the run without one: a tenth of the run."""
    num_steps = max(1, round(LAST_SHARE * len(curve)))
    until = shift_at - 1 if shift_at else len(curve)
    return float(curve[max(0, until - num_steps) : until].mean())


def _method_outcome(
    spec: str, runs: Sequence[RunCurves], first: Sequence[RunCurves], shift_at: int, threshold: float
) -> MethodOutcome:
    measured = [_measure(run, shift_at, threshold) for run in runs]
    measures = {name: SeedStats.over([each[name] for each in measured]) for name in measured[0]}
    sources = runs[0].evaluation["val_bits_per_byte_per_source"]
    per_source = {
        name: SeedStats.over([run.evaluation["val_bits_per_byte_per_source"][name] for run in runs]) for name in sources
    }
    bits = {run.seed: run.evaluation["val_bits_per_byte"] for run in first}
    against = [run.evaluation["val_bits_per_byte"] - bits[run.seed] for run in runs if run.seed in bits]
    return MethodOutcome(
        spec, tuple(run.seed for run in runs), measures, per_source, SeedStats.over(against), tuple(runs)
    )


def _measure(run: RunCurves, shift_at: int, threshold: float) -> dict[str, float | None]:
    """The measures of one run by name. Those of the shift are None where there is none (shift_at 0)."""
    vio = run.max_vio_batch
    after = vio[shift_at - 1 :] if shift_at else vio[:0]
    return {
        "val_perplexity": math.exp(run.evaluation["val_loss"]),
        "val_bits_per_byte": run.evaluation["val_bits_per_byte"],
        "max_vio_global": run.evaluation["max_vio_held_out"],
        "max_vio_global_in_mix": run.evaluation.get("max_vio_held_out_in_mix"),
        "max_vio_batch_before_shift": _settled(vio, shift_at) if shift_at else None,
        "max_vio_batch": _settled(vio, 0),
        "max_vio_computation_batch": _settled(run.max_vio_computation_batch, 0),
        "steps_to_balance": steps_until_below(vio[: shift_at - 1] if shift_at else vio, threshold),
        # The imbalance may grow some steps after the shift only: to recover says how soon, the peak how bad it was.
        "max_vio_batch_peak_after_shift": float(_running_mean(after).max(initial=0)) if shift_at else None,
        "steps_to_recover": steps_until_below(after, threshold),
        "step_s": float(np.median(run.step_s)),
    }
