"""A simulation as text for the terminal."""

import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from runtime.commands.plan.simulate.report import Report
from runtime.terminal.quantities import byte_size, counted, milliseconds, percent, short, three_digits
from runtime.terminal.tables import new_table

WIDTH = 120
NOTE = """\
MaxVio: most tokens of an expert over the mean, less 1, of what an expert-parallel group computes at once; the same in
each layer. The loads of the other experts follow a log-normal distribution, in another order in each layer. Times: over
the balanced step. Memory: at most, of the rank with most tokens. Last table: the step, and the times of a MaxVio, where
that assumption is 0.8 or 1.2 of what it is. Computed from rates that were measured elsewhere; docs/plan.md says how far
it can be trusted."""


def print_report(report: Report) -> None:
    """Print heading, parts of a step, costs, laws where there is a trace, and sensitivity."""
    console = Console(width=WIDTH, highlight=False)
    console.print(_heading(report), markup=False)
    for note in report.notes:
        console.print(f"{note}.", markup=False)
    for table in _tables(report):
        console.print()
        console.print(table)
    console.print()
    console.print(textwrap.fill(" ".join(NOTE.split()), WIDTH), markup=False)


def times(value: float) -> str:
    """1.1042 -> '1.104 x'."""
    return f"{value:.3f} x"


def _heading(report: Report) -> str:
    planned = report.planned
    rate = short(planned.balanced.tokens_per_s_per_rank)
    return (
        f"{report.subject.name} on {counted(planned.world_size, 'rank')} of {report.hardware.name}, "
        f"EP {planned.ep_size}: a balanced step takes {milliseconds(planned.balanced.step_s)}, {rate} tokens/s a rank"
    )


def _tables(report: Report) -> Iterator[Table]:
    yield _parts(report)
    yield _costs(report)
    yield _worlds(report)
    if report.laws:
        yield _laws(report)
    yield _sensitivity(report)


def _parts(report: Report) -> Table:
    table = new_table(("a balanced step", "time", "share"))
    for name, seconds in report.planned.balanced.parts.items():
        table.add_row(name, milliseconds(seconds), percent(seconds / report.planned.balanced.step_s))
    return table


def _costs(report: Report) -> Table:
    table = new_table(("MaxVio", "step", "times", "memory"))
    for each in report.planned.costs:
        row = (three_digits(each.max_vio), milliseconds(each.step_s), times(each.times_balanced))
        table.add_row(*row, byte_size(each.peak_bytes))
    return table


def _worlds(report: Report) -> Table:
    vios = [f"MaxVio {three_digits(each.max_vio)}" for each in report.planned.costs]
    table = new_table(("ranks", "EP", "balanced step", "tokens/s a rank", *vios))
    for world in report.worlds:
        rate = short(world.balanced.tokens_per_s_per_rank)
        row = (f"{world.world_size:,}", str(world.ep_size), milliseconds(world.balanced.step_s), rate)
        table.add_row(*row, *(times(each.times_balanced) for each in world.costs))
    return table


def _laws(report: Report) -> Table:
    heads = (f"law on {report.trace}", "MaxVio", "step", "times", "all steps", "worst step", "memory")
    table = new_table(heads)
    for law in report.laws:
        costs = (times(each) for each in (law.steady_times, law.mean_times, law.worst_times))
        table.add_row(law.law, three_digits(law.max_vio), milliseconds(law.step_s), *costs, byte_size(law.peak_bytes))
    return table


def _sensitivity(report: Report) -> Table:
    vio = f"MaxVio {three_digits(report.sensitive_vio)}"
    table = new_table(("an assumption", "step at 0.8", "step at 1.2", f"{vio}, times at 0.8", f"{vio}, times at 1.2"))
    for each in report.sensitivities:
        table.add_row(each.name, *map(milliseconds, each.step_s), *map(times, each.times_balanced))
    return table
