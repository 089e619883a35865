"""The HTML of a report: figures, events and settings as plain HTML, which needs no script, and the charts."""

import base64
import hashlib
import html
import json
import time
from collections.abc import Iterator, Sequence
from string import Template
from typing import Any

from runtime.report.held import held_json
from runtime.report.page_script import library, page_script, style
from runtime.report.run_record import MAX_VIO_DEFINITION, Headline, RunRecord, headlines, phase_shares
from runtime.runs.event_text import STACKS, event_text
from runtime.terminal.quantities import duration, milliseconds, percent, three_digits
from workers.record.record_lines import Line

MAX_EVENTS = 400  # Of more events, the first NUM_FIRST_EVENTS and the last ones are shown.
NUM_FIRST_EVENTS = 40
MAX_STACK_CHARACTERS = 32_000  # of one event
MAX_EVENT_CHARACTERS = 4_000
MAX_STACKS = 32  # Only the last events are shown with their stacks.
MAX_EVALUATIONS = 12  # rows of the table, evenly spaced over the run
_VERDICTS = {True: "good", False: "bad", None: ""}

# The browser runs only the scripts and styles with these hashes, loads nothing from elsewhere, and makes no markup of
# text: names and settings of a run may come from anybody.
_POLICY = (
    "default-src 'none'; script-src $hashes; style-src '$style_hash'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'"
)

_PAGE = Template(f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="content-security-policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: training report</title>
<style>$style</style>
</head>
<body>
<header>
<div class="title"><h1>$title</h1></div>
<div id="state" class="state $state"><span class="word">$state</span></div>
<p id="when" class="muted">$summary</p>
</header>
<main>
<section class="cards figures" aria-label="Figures">
$headlines
</section>
$charts
$tables
<h2>Events</h2>
$events
<h2>Configuration</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Configuration"><table class="config"><tbody>
$config
</tbody></table></div>
</main>
$scripts
</body>
</html>
""")

_CHARTS = f"""<h2>Charts</h2>
<noscript><p class="note">The charts need JavaScript; the figures need none.</p></noscript>
<p class="note">{MAX_VIO_DEFINITION};
0 is perfect. Perfectly balanced routing with independent tokens would still show what comes by chance.</p>
<div id="window" class="window" role="group" aria-label="Window of steps"></div>
<div id="view"></div>"""


def page_of(record: RunRecord, summary: str) -> str:
    """The text of report.html. summary: one sentence about the run."""
    scripts = [library(), page_script()] if record.train or record.evals else []
    sheet = style()
    return _PAGE.substitute(
        title=_text(record.name),
        state=_text(record.state),
        summary=_text(summary),
        style=sheet,
        style_hash=_digest(sheet),
        hashes=" ".join(f"'{_digest(each)}'" for each in scripts) or "'none'",
        headlines="\n".join(map(_card, headlines(record))),
        charts=_CHARTS if scripts else "<p>No step was recorded.</p>",
        tables="\n".join(_tables(record)),
        events=_table("Events", ("Time", "Since the start", "Event", "What"), _event_rows(record.events), "events"),
        config="\n".join(_config_rows(record.config)),
        scripts=_script_elements(record, scripts),
    )


def _script_elements(record: RunRecord, scripts: list[str]) -> str:
    if not scripts:
        return ""
    held = f'<script id="held" type="application/json">{held_json(record)}</script>'
    return "\n".join([held, *(f"<script>{script}</script>" for script in scripts)])


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _card(figure: Headline) -> str:
    return (
        f'<div class="card {_VERDICTS[figure.verdict]}"><div class="label">{_text(figure.label)}</div>'
        f'<div class="value">{_text(figure.value)}</div><p class="note">{_text(figure.note)}</p></div>'
    )


def _tables(record: RunRecord) -> Iterator[str]:
    if shares := phase_shares(record):
        rows = [[_td(name), _td(milliseconds(seconds)), _td(percent(share))] for name, seconds, share in shares]
        yield "<h2>Where the time of all steps went</h2>"
        yield _table("Where the time of all steps went", ("Part", "Mean", "Share"), rows, "plain")
    if record.evals:
        num = min(len(record.evals), MAX_EVALUATIONS)
        places = sorted({round(n * (len(record.evals) - 1) / max(num - 1, 1)) for n in range(num)})
        rows = [_evaluation(record.evals[n]) for n in places]
        yield "<h2>Evaluations</h2>"
        yield _table("Evaluations", ("Step", "Held-out loss", "Bits per byte", "MaxVio_global"), rows, "plain")


def _evaluation(line: Line) -> list[str]:
    values = [line.get(name) for name in ("val_loss", "val_bits_per_byte", "max_vio_global")]
    return [_td(str(line["step"])), *(_td("n/a" if value is None else three_digits(value)) for value in values)]


def _table(label: str, head: Sequence[str], rows: Sequence[list[str]], kind: str) -> str:
    heads = "".join(f'<th scope="col">{_text(each)}</th>' for each in head)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(label)}"><table class="{kind}">'
        f"<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _td(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{_text(text)}</td>' if kind else f"<td>{_text(text)}</td>"


def _config_rows(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _config_rows(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"<tr>{_td(prefix + str(key))}{_td(shown)}</tr>"


def _event_rows(events: list[Line]) -> list[list[str]]:
    """Rows of the table of events: all, or of more than MAX_EVENTS the first and the last ones."""
    with_stacks = [n for n, event in enumerate(events) if any(event.get(name) for name in STACKS)][-MAX_STACKS:]
    rows = [_event(event, events[0], shows_stacks=n in with_stacks) for n, event in enumerate(events)]
    if (num_left_out := len(rows) - MAX_EVENTS) <= 0:
        return rows
    gap = [_td(""), _td(""), _td(""), _td(f"{num_left_out:,} events more; all are in events.jsonl", "text")]
    return [*rows[:NUM_FIRST_EVENTS], gap, *rows[NUM_FIRST_EVENTS - MAX_EVENTS :]]


def _event(event: Line, first: Line, *, shows_stacks: bool) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    folded = "".join(_folded(name, event[name]) for name in STACKS if shows_stacks and event.get(name))
    words = _text(event_text(event)[:MAX_EVENT_CHARACTERS])
    return [
        _td(when, "nowrap"),
        _td(f"+{duration(event['time'] - first['time'])}", "nowrap"),
        _td(str(event["event"])[:64].replace("_", " "), "kind"),
        f'<td class="text">{words}{folded}</td>',
    ]


def _folded(title: str, text: Any) -> str:
    return f"<details><summary>{_text(title)}</summary><pre>{_text(str(text)[:MAX_STACK_CHARACTERS])}</pre></details>"


def _text(value: str) -> str:
    return html.escape(value)
