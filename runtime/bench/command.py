"""`trimtab bench TARGET`: a small table of what can be measured."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.bench.options import dispatch_parser

if TYPE_CHECKING:
    from runtime.bench.case import Case
    from runtime.bench.turns import Measurement

COLLECTIVE_LIMIT = timedelta(minutes=10)  # a rank that waits longer for another has lost it


def bench(arguments: Sequence[str]) -> int:
    """Measure what the first argument names and return the exit code."""
    target = _target_parser().parse_args(arguments[:1]).target
    return TARGETS[target](arguments[1:])


def bench_dispatch(arguments: Sequence[str]) -> int:
    """The MoE layer: phases, bytes, bandwidth and matmul rate, beside the limits of this machine."""
    given = dispatch_parser().parse_args(arguments)
    from dispatch.launch import launch
    from runtime.bench.case import case_of
    from runtime.bench.turns import measure

    case, out = case_of(given), _out_dir(given.out)
    measured = launch(case.workers, case.device, COLLECTIVE_LIMIT, measure, case)
    if measured is not None:  # not another rank of a launcher
        _show(case, measured, out)
    return 0


TARGETS: Mapping[str, Callable[[Sequence[str]], int]] = {"dispatch": bench_dispatch}


def _target_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:12}{run.__doc__}" for name, run in TARGETS.items())
    parser = argparse.ArgumentParser(
        prog="trimtab bench",
        usage="trimtab bench TARGET [options]",
        description="Measure a part of Trimtab on this machine.",
        epilog=f"targets:\n{listing}\n\n`trimtab bench TARGET --help` explains the options of a target.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help="what to measure, see below")
    return parser


def _show(case: "Case", measured: "Measurement", out: Path) -> None:
    from runtime.bench.chart import write_chart
    from runtime.bench.figures import figures_of
    from runtime.bench.table import as_text, describe

    figures = {dtype: figures_of(samples) for dtype, samples in measured.by_dtype.items()}
    sys.stdout.write(as_text(case, measured.exchange, figures))
    sys.stdout.flush()
    record = _new_name(out, datetime.now())
    values = {
        "case": case.to_json(),
        "exchange": measured.exchange,
        "figures": {dtype: each.to_json() for dtype, each in figures.items()},
        "samples": {dtype: each.samples for dtype, each in measured.by_dtype.items()},
    }
    record.write_text(json.dumps(values) + "\n")
    write_chart(figures, describe(case, measured.exchange), record.with_suffix(".png"))
    sys.stdout.write(f"\n{record}\n{record.with_suffix('.png')}\n")


def _out_dir(name: str) -> Path:
    """The folder, made if it is not there."""
    path = Path(name).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {name} cannot be made: {error.strerror}; give a folder that can be written") from error
    return path


def _new_name(folder: Path, now: datetime) -> Path:
    """A name that nothing has yet: the time, with a number where two measurements end in one second."""
    stem, number = now.strftime("%Y%m%d-%H%M%S"), 1
    while (path := folder / f"{stem}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return path
