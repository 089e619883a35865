"""report.html of a run: one file that needs nothing else, made from the run directory alone."""

import html
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dispatch.errors import InvalidValue
from runtime.report.chart_style import new_figure, to_svg, write_png
from runtime.report.charts import CHARTS, Chart, draw_overview
from runtime.report.event_text import STACKS, event_text
from runtime.report.load_map import MAX_LABELS
from runtime.report.report_page import PAGE
from runtime.report.run_record import Headline, RunRecord, headlines
from runtime.terminal.quantities import duration
from runtime.terminal.say import say
from workers.record.atomic_file import write_atomically
from workers.record.record_lines import Line

REPORT = "report.html"
_VERDICTS = {True: "good", False: "bad", None: "plain"}


def write_report(run_dir: str | Path) -> Path:
    """Write report.html into a run directory, finished or not, and return its path.

    Raises:
        ValueError: there is no run in `run_dir`.
    """
    record = RunRecord.read(run_dir)
    charts = [chart for chart in CHARTS if chart.shows(record)]
    page = PAGE.substitute(
        title=_text(record.name),
        state=_text(record.state),
        summary=_text(_summary(record)),
        headlines="\n".join(map(_card, headlines(record))),
        charts="\n".join(_chart(chart, record) for chart in charts) or "<p>No step was recorded.</p>",
        config="\n".join(_config_rows(record.config)),
        events="\n".join(_event_rows(record.events)),
    )
    target = record.path / REPORT
    write_atomically(target, page)  # a browser that reloads never shows half a page
    return target


def write_picture(run_dir: str | Path, target: str | Path, *, dpi: int = 130) -> Path:
    """Write the main charts as one PNG, for a README or a talk.

    Raises:
        ValueError: there is no run in `run_dir`, or it has no curve to draw.
    """
    record = RunRecord.read(run_dir)
    if len(record.train) < 2 or not record.has_moe:
        raise InvalidValue(f"{run_dir} has {len(record.train)} recorded steps; a picture needs two of an MoE model")
    write_png(lambda figure: draw_overview(figure, record), (15.5, 6.8), Path(target), dpi=dpi)
    return Path(target)


def print_summary(run_dir: str | Path, console: Console) -> None:
    """The headline figures, for the end of a run: a table on a terminal, unbroken lines elsewhere."""
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
    of = f" of {record.total_steps}" if record.total_steps else ""
    layout = record.history.layout
    experts = "no MoE layer"
    if layout.names:
        sizes = sorted(set(layout.num_experts))
        experts = f"{len(layout.names)} MoE layers of {' or '.join(map(str, sizes))} experts"
    return f"Step {done}{of}, {experts}" + (f", balance.law {record.law}" if record.law else "")


def _card(figure: Headline) -> str:
    return (
        f'<div class="card {_VERDICTS[figure.verdict]}"><div class="label">{_text(figure.label)}</div>'
        f'<div class="value">{_text(figure.value)}</div><div class="note">{_text(figure.note)}</div></div>'
    )


def _chart(chart: Chart, record: RunRecord) -> str:
    height = 1.5 + 0.17 * min(MAX_LABELS, len(record.history.layout.names)) if chart.wide else 3.2
    figure = new_figure(lambda figure: chart.draw(figure, record), (11.6 if chart.wide else 5.7, height))
    return (
        f'<figure class="{"wide" if chart.wide else "half"}">{to_svg(figure, chart.title)}'
        f"<figcaption>{_text(chart.explanation)}</figcaption></figure>"
    )


def _config_rows(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _config_rows(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"<tr><td>{_text(prefix + str(key))}</td><td>{_text(shown)}</td></tr>"


def _event_rows(events: list[Line]) -> Iterator[str]:
    for event in events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        since = duration(event["time"] - events[0]["time"])
        cells = [_text(cell) for cell in (when, f"+{since}", str(event["event"]).replace("_", " "), event_text(event))]
        cells[-1] += "".join(_folded(name, event[name]) for name in STACKS if event.get(name))
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _folded(title: str, text: Any) -> str:
    return f"<details><summary>{_text(title)}</summary><pre>{_text(str(text))}</pre></details>"


def _text(value: str) -> str:
    return html.escape(value)
