"""Measures the MoE layer on all ranks, prints the table, and writes samples and picture."""

import json
import sys
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path

from dispatch.parity.launch import launch
from runtime.commands.bench.dispatch.case import LayerCase
from runtime.commands.bench.dispatch.figures import figures_of
from runtime.commands.bench.dispatch.table import as_text, describe
from runtime.commands.bench.dispatch.turns import LayerMeasurement, measure
from runtime.commands.out import new_name

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
    record = new_name(out, datetime.now())
    values = {
        "case": asdict(case),
        "exchange": measured.exchange,
        "figures": {dtype: each.to_json() for dtype, each in figures.items()},
        "samples": {dtype: each.samples for dtype, each in measured.by_dtype.items()},
    }
    record.write_text(json.dumps(values) + "\n")
    write_chart(figures, describe(case, measured.exchange), record.with_suffix(".png"))
    sys.stdout.write(f"\n{record}\n{record.with_suffix('.png')}\n")
