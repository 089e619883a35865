"""What a user sees while a comparison trains: bars in a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runtime.commands.compare.plan import ComparePlan, RunKey
from runtime.commands.compare.run_pool import ActiveRun, EndedRun
from runtime.terminal.quantities import duration
from workers.checkpoints.checkpoint_files import step_of

PLAIN_EVERY_S = 30.0


class CompareView:
    """Shows how many runs are done, the step of each active run, and the time left. A context manager.

    Args:
        unfinished: the runs to do; the others of the plan are finished already.
        clock: returns seconds.
    """

    def __init__(
        self,
        plan: ComparePlan,
        unfinished: Sequence[RunKey],
        console: Console,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._console, self._clock = plan, console, clock
        self._num_runs = plan.num_seeds * len(plan.methods)
        self._num_done = self._num_runs - len(unfinished)
        self._steps = plan.base.run.steps
        checkpoints = {key: plan.newest_checkpoint(key) for key in unfinished}
        # What each run has still to do; the time left follows from how fast this shrinks.
        self._left = {key: self._steps - (step_of(path) if path else 0) for key, path in checkpoints.items()}
        self._first_left = sum(self._left.values())
        self._began = clock()
        self._printed_s = self._began
        self._active: list[tuple[str, int]] = []
        is_capable = console.file.isatty() and not console.is_dumb_terminal
        self._live = Live(console=console, get_renderable=self._frame, refresh_per_second=4) if is_capable else None

    def show(self, active: Sequence[ActiveRun]) -> None:
        """Where the active runs are now."""
        self._active = [(str(run.key), run.step) for run in active]
        for run, (_, step) in zip(active, self._active, strict=True):
            self._left[run.key] = self._steps - step
        if self._live is None and self._clock() - self._printed_s >= PLAIN_EVERY_S:
            self._printed_s = self._clock()
            places = ", ".join(f"{name} at step {step}" for name, step in self._active)
            self.say(f"{self._summary()}; {places}")

    def ended(self, run: EndedRun) -> None:
        """A run is done, has saved because of a stop, or failed."""
        if run.reason is not None:
            self._left[run.key] = 0
            self.say(f"{run.key} failed after {duration(run.seconds)}: {run.reason}")
        elif self._plan.is_finished(run.key):
            self._left[run.key] = 0
            self._num_done += 1
            self.say(f"{run.key} done in {duration(run.seconds)}; {self._summary()}")
        else:
            self.say(f"{run.key} stopped, saved")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=self._live is None)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._active = []
            self._live.stop()

    def _summary(self) -> str:
        passed_s, left = self._clock() - self._began, sum(self._left.values())
        made = self._first_left - left
        left_s = passed_s / made * left if made else float("nan")
        return f"{self._num_done}/{self._num_runs} runs, {duration(passed_s)}, left {duration(left_s)}"

    def _frame(self) -> RenderableType:
        rows = Table.grid(padding=(0, 2, 0, 0), expand=True)
        rows.add_column(no_wrap=True)
        rows.add_column(ratio=1)
        rows.add_column(no_wrap=True, justify="right")
        for name, step in self._active:
            rows.add_row(Text(name), ProgressBar(self._steps, step), Text(f"{step}/{self._steps}"))
        return Group(rows, Text(self._summary(), style="bold"))
