"""What a user sees while a run trains: a live view in a terminal, plain lines anywhere else."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runtime.terminal.quantities import duration, milliseconds, percent, short, three_digits

EVERY_S = 5.0  # at least, between two plain lines of steps
RATE_WINDOW = 64  # steps from whose time, with evaluations and checkpoints between them, the time left is estimated
CURVE_WIDTH = 32  # characters of a small curve, which shows all steps so far
MIN_WIDTH = 72  # A narrower terminal shows names and values only.
_TICKS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Shows steps, evaluations and events of a run. A context manager; leaves the last state on the screen.

    Args:
        total_steps: optimizer steps of the whole run.
        done_steps: those made before, when a run resumes.
        console: where to; by default standard output.
        live: True draws the live view, False prints plain lines. None draws it on a terminal that can move its cursor.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        done_steps: int = 0,
        console: Console | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        # `isatty` of the file, not rich's `is_terminal`: FORCE_COLOR makes that true for a pipe, which has no cursor.
        is_capable = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._total_steps, self._clock = total_steps, clock
        self._began = clock()
        self._pace = deque([(self._began, done_steps)], maxlen=RATE_WINDOW + 1)
        # rich's refreshing thread reads these without a lock. So `_line` is replaced, never changed, and the lists only
        # grow.
        self._line: Mapping[str, Any] = {"step": done_steps}
        self._losses: list[float] = []
        self._vios: list[float] = []
        self._left_s = math.nan
        self._printed_s = -math.inf
        self._saving = ""
        self._live: Live | None = None
        if is_capable if live is None else live:
            self._live = Live(console=self._console, get_renderable=self._frame, refresh_per_second=4)

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a training step: a line of metrics.jsonl."""
        now = self._clock()
        self._pace.append((now, line["step"]))
        (first_s, first_step), (last_s, last_step) = self._pace[0], self._pace[-1]
        per_step = (last_s - first_s) / max(last_step - first_step, 1)
        self._left_s = per_step * max(self._total_steps - last_step, 0)
        self._losses.append(_number(line, "loss"))
        self._vios.append(_number(line, "max_vio_batch"))
        self._line = dict(line)
        is_last = line["step"] >= self._total_steps
        if not self._live and (is_last or now - self._printed_s >= EVERY_S):
            self._printed_s = now
            self._print(_plain_line(line, self._total_steps, self._left_s))

    def resumed(self, step: int) -> None:
        """Note that training goes on after `step`, which may be before the last one shown."""
        self._pace.clear()
        self._pace.append((self._clock(), step))
        self._line = {**self._line, "step": step}

    def eval(self, line: Mapping[str, Any]) -> None:
        """Show an evaluation: a line of metrics.jsonl. In a terminal it stays above the live view, as events do."""
        text = f"step {line['step']}/{self._total_steps}  held out: {_value(line, 'val_bits_per_byte')} bits/byte"
        text += f"  loss {_value(line, 'val_loss')}"
        if line.get("max_vio_global") is not None:
            text += f"  MaxVio_global {_value(line, 'max_vio_global')}"
        self._print(text)

    def event(self, text: str) -> None:
        """Print a line about something that happened."""
        self._saving = ""  # Saving ends with an event of success or failure.
        self._print(text)

    def saving(self, text: str) -> None:
        """Show the progress of the last checkpoint, for which the run waits."""
        now = self._clock()
        if not self._live and now - self._printed_s >= EVERY_S:
            self._printed_s = now
            self._print(text)
        self._saving = text

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def _print(self, text: str) -> None:
        # Text, so that brackets are not read as markup. Soft wrap, so that a program that reads the output gets each
        # line whole.
        self._console.print(Text(text), soft_wrap=self._live is None)

    def _frame(self) -> RenderableType:
        step = self._line["step"]
        times = f"{duration(self._clock() - self._began)}, left {duration(self._left_s)}"
        bar = Table.grid(padding=(0, 2, 0, 0), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(ProgressBar(self._total_steps, step), Text(f"{step}/{self._total_steps}  {times}"))
        if self._saving:
            return Group(bar, Text(self._saving))
        if "loss" not in self._line:
            return bar
        return Group(bar, self._figures(is_wide=self._console.width >= MIN_WIDTH))

    def _figures(self, *, is_wide: bool) -> Table:
        line = self._line
        draws = is_wide and self._console.encoding.lower().startswith("utf")
        wait = _number(line, "control_wait_s") / max(_number(line, "step_s"), 1e-9)
        pace = f"{milliseconds(_number(line, 'step_s'))} a step  control wait {percent(wait)}"
        if line.get("mfu") is not None:
            pace += f"  MFU {percent(line['mfu'])}"
        floor, dead = _value(line, "max_vio_floor"), f"dead experts {line.get('dead_experts', 'n/a')}"
        rates = f"grad norm {_value(line, 'grad_norm')}  lr {_number(line, 'lr'):.2g}"
        rows = [
            ("loss", _value(line, "loss"), self._losses, rates),
            ("MaxVio", _value(line, "max_vio_batch"), self._vios, f"floor {floor}  {dead}"),
            ("tokens/s", short(_number(line, "tokens_per_s")), [], pace),
        ]
        table = Table.grid(padding=(0, 2, 0, 0))
        for style in ("dim", "bold", "cyan", "dim"):
            table.add_column(style=style, no_wrap=True)
        for name, value, history, note in rows:
            table.add_row(name, value, _curve(history) if draws else "", note if is_wide else "")
        return table


def _plain_line(line: Mapping[str, Any], total_steps: int, left_s: float) -> str:
    return "  ".join([
        f"step {line['step']}/{total_steps}",
        f"loss {_value(line, 'loss')}",
        f"MaxVio {_value(line, 'max_vio_batch')} (floor {_value(line, 'max_vio_floor')})",
        f"{short(_number(line, 'tokens_per_s'))} tokens/s",
        f"left {duration(left_s)}",
    ])  # fmt: skip


def _curve(values: Sequence[float]) -> str:
    """A row of bars, each the mean of equally many neighbouring `values`, scaled from the lowest to the highest bar."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not known.size:
        return ""
    bins = np.array([part.mean() for part in np.array_split(known, min(CURVE_WIDTH, known.size))])
    heights = (bins - bins.min()) / (np.ptp(bins) or 1.0)
    return "".join(_TICKS[round(height * (len(_TICKS) - 1))] for height in heights.tolist())


def _number(line: Mapping[str, Any], field: str) -> float:
    value = line.get(field)
    return math.nan if value is None else float(value)


def _value(line: Mapping[str, Any], field: str) -> str:
    return three_digits(_number(line, field))
