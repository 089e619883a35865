"""The picture of a chaos run: its step number over time, with a line where each fault struck."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from runtime.commands.chaos.trial import Trial
from runtime.report.chart_style import THEME, new_axes, set_head, write_png

NUMBER_ROWS = 4  # Numbers of faults that strike soon after each other are written in rows, so as not to overlap.
VERDICT_COLORS = {"survived": "green", "refused": "blue", "FAILED": "red"}


def write_chart(steps: Sequence[tuple[float, int]], trials: Sequence[Trial], target: Path) -> None:
    """Write the PNG. steps: Unix time and number of every step; a step that was repeated is there twice."""
    write_png(lambda figure: _draw(figure, sorted(steps), trials), (9.2, 4.2), target)


def _draw(figure: FigureBase, steps: Sequence[tuple[float, int]], trials: Sequence[Trial]) -> None:
    axes = new_axes(figure, "minutes", "step")
    begun = steps[0][0] if steps else 0.0
    axes.plot([(time - begun) / 60 for time, _ in steps], [step for _, step in steps], color=THEME["ink"], lw=1.2)
    for trial in trials:
        if math.isnan(trial.struck):
            continue
        minute, color = (trial.struck - begun) / 60, THEME[VERDICT_COLORS[trial.verdict]]
        axes.axvline(minute, color=color, lw=0.9, alpha=0.8)
        if not math.isnan(trial.recovered_s):
            axes.axvspan(minute, minute + trial.recovered_s / 60, color=color, alpha=0.12, lw=0)
        height = 0.97 - 0.05 * (trial.fault.number % NUMBER_ROWS)
        axes.text(
            minute, height, f" {trial.fault.number + 1}", transform=axes.get_xaxis_transform(), color=color, fontsize=7
        )
    handles = [Line2D([], [], color=THEME[color], label=name) for name, color in VERDICT_COLORS.items()]
    set_head(axes, "Steps of the run, and the faults by their number", handles)
