"""The picture of a comparison: MaxVio over the steps, and below it perplexity and MaxVio at the end, by method."""

from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from runtime.commands.compare.outcome import MethodOutcome, Outcome
from runtime.report.chart_style import (
    LOOKS,
    THEME,
    average,
    new_axes,
    set_head,
    set_log_scale,
    set_title,
    write_png,
)

MAX_POINTS = 100


def write_chart(outcome: Outcome, target: Path) -> None:
    """Write the PNG."""
    num_methods = len(outcome.methods)
    size = (9.2, 4.6 + 0.3 * num_methods)
    write_png(lambda figure: _draw(figure, outcome), size, target)


def _draw(figure: FigureBase, outcome: Outcome) -> None:
    heights = (3.4, 0.9 + 0.28 * len(outcome.methods))
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights, hspace=0.04)[:, 0]
    _draw_curves(upper, outcome)
    left, right = lower.subfigures(1, 2, squeeze=False, width_ratios=(1.35, 1), wspace=0.02)[0]
    _draw_points(left, outcome, "val_perplexity", "Held-out perplexity", named=True)
    _draw_points(right, outcome, "max_vio_global", "MaxVio_global on held-out text", named=False)


def _draw_curves(figure: FigureBase, outcome: Outcome) -> None:
    axes = new_axes(figure, "step", "MaxVio_batch (log scale)")
    handles: list[Artist] = []
    drawn = []
    for number, method in enumerate(outcome.methods):
        color, style = _look(number)
        x, means, lowest, highest = _band(method)
        axes.fill_between(x, lowest, highest, color=color, alpha=0.13, lw=0)
        handles += axes.plot(x, means, style, color=color, lw=1.5, label=method.spec)
        drawn += [lowest, highest]
    handles.append(
        axes.axhline(outcome.threshold, color=THEME["muted"], lw=0.9, ls=(0, (1, 2)), label="balanced below")
    )
    if outcome.shift_at:
        axes.axvline(outcome.shift_at, color=THEME["muted"], lw=0.9)
        place = (outcome.shift_at, 0.97)
        axes.annotate(
            "the mix shifts", place, (4, 0), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
            va="top", color=THEME["muted"],
        )  # fmt: skip
    set_log_scale(axes, np.concatenate(drawn))
    set_head(axes, "Load imbalance of a batch: mean and range of the seeds", handles)


def _band(method: MethodOutcome) -> tuple[NDArray[np.float64], ...]:
    """Steps, mean, lowest and highest of the seeds, each averaged over neighbouring steps."""
    num_steps = min(len(run.max_vio_batch) for run in method.curves)
    steps = np.arange(1, num_steps + 1)
    each = np.array([average(steps, run.max_vio_batch[:num_steps], MAX_POINTS)[1] for run in method.curves])
    return average(steps, steps.astype(float), MAX_POINTS)[0], each.mean(0), each.min(0), each.max(0)


def _draw_points(figure: FigureBase, outcome: Outcome, measure: str, title: str, *, named: bool) -> None:
    """A row for each method, the first on top: a point for each seed, and their mean as a mark and a number."""
    axes = new_axes(figure, "", "")
    for number, method in enumerate(outcome.methods):
        color, _ = _look(number)
        spread = method.measures[measure]
        values = [value for value in spread.values if value is not None]
        axes.plot(values, [-number] * len(values), "o", color=color, ms=4, alpha=0.6, lw=0)
        axes.plot([np.mean(values)], [-number], "|", color=color, ms=13, mew=2)
        label = f"{np.mean(values):.3f}"
        axes.annotate(label, (1.01, -number), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    specs = [method.spec for method in outcome.methods] if named else [""] * len(outcome.methods)
    axes.set_yticks([-number for number in range(len(outcome.methods))], specs)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-len(outcome.methods) + 0.4, 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.06)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=THEME["grid"], lw=0.8)
    set_title(axes, title)


def _look(number: int) -> tuple[str, str]:
    color, style = LOOKS[number % len(LOOKS)]
    return THEME[color], style
