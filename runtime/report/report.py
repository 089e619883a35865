"""report.html of a run: one file without external parts, made from the run directory alone."""

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from runtime.report.report_page import page_of
from runtime.report.run_record import RunRecord, headlines
from runtime.terminal.say import say
from workers.record.atomic_file import write_atomically

REPORT = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write report.html into a run directory, finished or not, and return its path.

    Raises:
        InvalidValue: there is no run in `run_dir`, or one of its files is damaged.
    """
    record = RunRecord.read(run_dir)
    target = record.path / REPORT
    write_atomically(target, page_of(record, _summary(record)))  # a browser that reloads never shows half a page
    return target


def print_summary(run_dir: str | Path, console: Console) -> None:
    """Print the headline figures of a run: as a table on a terminal, elsewhere as lines that are not wrapped."""
    record = RunRecord.read(run_dir)
    if console.is_terminal:
        console.print(_summary_table(record))
        return
    say(console, _title(record))
    for figure in headlines(record):
        say(console, f"{figure.label:27} {figure.value:>16}  {figure.note}")


def _summary_table(record: RunRecord) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for figure in headlines(record):
        style = {True: "bold green", False: "bold red", None: "bold"}[figure.verdict]
        table.add_row(figure.label, Text(figure.value, style), figure.note)
    return Group(Text(_title(record), "bold"), table)


def _title(record: RunRecord) -> str:
    return f"{record.name}: {record.state}. {_summary(record)}"


def _summary(record: RunRecord) -> str:
    done = f"{record.steps[-1]}" if record.train else "0"
    total = f" of {record.total_steps}" if record.total_steps else ""
    layout = record.history.layout
    experts = "no MoE layer"
    if layout.names:
        sizes = sorted(set(layout.num_experts))
        experts = f"{len(layout.names)} MoE layers of {' or '.join(map(str, sizes))} experts"
    return f"Step {done}{total}, {experts}" + (f", balance.law {record.law}" if record.law else "")
