"""Measures the MoE layer on all ranks, prints the table, and writes samples and picture."""

import sys
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

from dispatch.parity.launch import launch
from runtime.commands.bench.dispatch.case import LayerCase
from runtime.commands.bench.dispatch.figures import figures_of
from runtime.commands.bench.dispatch.table import as_text, describe
from runtime.commands.bench.dispatch.turns import LayerMeasurement, measure
from runtime.commands.results import write_measurement

COLLECTIVE_LIMIT = timedelta(minutes=10)  # a rank that waits longer for another has lost it


def run_benchmark(case: LayerCase, out: Path) -> int:
    """Measure and show what was found. Returns the exit code."""
    measured = launch(case.workers, case.device, COLLECTIVE_LIMIT, measure, case)
    if measured is not None:  # not another rank of a launcher
        _show(case, measured, out)
    return 0


def _show(case: LayerCase, measured: LayerMeasurement, out: Path) -> None:
    from runtime.commands.bench.dispatch.chart import write_chart  # matplotlib takes a second

    figures = {dtype: figures_of(samples) for dtype, samples in measured.by_dtype.items()}
    sys.stdout.write(as_text(case, measured.exchange, figures))
    sys.stdout.flush()
    values = {
        "case": asdict(case),
        "exchange": measured.exchange,
        "figures": {dtype: each.to_json() for dtype, each in figures.items()},
        "samples": {dtype: each.samples for dtype, each in measured.by_dtype.items()},
    }
    write_measurement(out, values, partial(write_chart, figures, describe(case, measured.exchange)))
