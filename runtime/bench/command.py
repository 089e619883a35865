"""`trimtab bench TARGET`: a small table of what can be measured."""

import json
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.bench.balance.options import balance_parser
from runtime.bench.coordinator.options import coordinator_parser
from runtime.bench.options import dispatch_parser
from runtime.bench.out import new_name, out_dir
from runtime.choices import Choices, choice_parser, chosen

if TYPE_CHECKING:
    from runtime.bench.case import Case
    from runtime.bench.turns import Measurement

COLLECTIVE_LIMIT = timedelta(minutes=10)  # a rank that waits longer for another has lost it


def bench(arguments: Sequence[str]) -> int:
    """Measure what the first argument names and return the exit code."""
    parser = choice_parser("trimtab bench", "TARGET", TARGETS, "Measure a part of Trimtab on this machine.")
    return TARGETS[chosen(parser, arguments)](arguments[1:])


def bench_dispatch(arguments: Sequence[str]) -> int:
    """The MoE layer: phases, bytes, bandwidth and matmul rate, beside the limits of this machine."""
    given = dispatch_parser().parse_args(arguments)
    from dispatch.launch import launch
    from runtime.bench.case import case_of
    from runtime.bench.turns import measure

    case, out = case_of(given), out_dir(given.out)
    measured = launch(case.workers, case.device, COLLECTIVE_LIMIT, measure, case)
    if measured is not None:  # not another rank of a launcher
        _show(case, measured, out)
    return 0


def bench_coordinator(arguments: Sequence[str]) -> int:
    """The control path: a round of real ranks and the real coordinator by phase, and a model of up to 2,048 ranks."""
    given = coordinator_parser().parse_args(arguments)
    from runtime.bench.coordinator.case import case_of

    case, out = case_of(given), out_dir(given.out)
    from runtime.bench.coordinator.command import run

    return run(case, out)


def bench_balance(arguments: Sequence[str]) -> int:
    """The balancing laws on simulated routers and recorded runs, beside the published law, tuned."""
    given = balance_parser().parse_args(arguments)
    from runtime.bench.balance.command import run

    return run(given.seeds, given.steps, given.run, given.first, given.law, out_dir(given.out))


TARGETS: Choices = {"dispatch": bench_dispatch, "coordinator": bench_coordinator, "balance": bench_balance}


def _show(case: "Case", measured: "Measurement", out: Path) -> None:
    from runtime.bench.chart import write_chart
    from runtime.bench.figures import figures_of
    from runtime.bench.table import as_text, describe

    figures = {dtype: figures_of(samples) for dtype, samples in measured.by_dtype.items()}
    sys.stdout.write(as_text(case, measured.exchange, figures))
    sys.stdout.flush()
    record = new_name(out, datetime.now())
    values = {
        "case": case.to_json(),
        "exchange": measured.exchange,
        "figures": {dtype: each.to_json() for dtype, each in figures.items()},
        "samples": {dtype: each.samples for dtype, each in measured.by_dtype.items()},
    }
    record.write_text(json.dumps(values) + "\n")
    write_chart(figures, describe(case, measured.exchange), record.with_suffix(".png"))
    sys.stdout.write(f"\n{record}\n{record.with_suffix('.png')}\n")
