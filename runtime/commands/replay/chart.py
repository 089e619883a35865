"""Laws side by side as a picture: MaxVio of a batch over the steps of the trace."""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from runtime.commands.replay.comparison import Comparison
from runtime.report.chart_style import (
    LOOKS,
    THEME,
    average,
    new_axes,
    set_head,
    set_log_scale,
    step_label,
    write_png,
)

FLOOR_STYLES = {"practical floor": "-", "chance floor": ":"}


def write_chart(comparison: Comparison, target: Path) -> None:
    """Write the PNG."""
    write_png(lambda figure: draw_comparison(figure, comparison), (9.2, 4.4), target)


def draw_comparison(figure: FigureBase, comparison: Comparison) -> None:
    """A curve for each law, the floors, and the shift where there is one."""
    first, last = comparison.steps
    steps = np.arange(first, last + 1)
    axes = new_axes(figure, step_label(len(steps)), "MaxVio_batch (log scale)")
    curves = {label: average(steps, law.max_vio_S) for label, law in comparison.laws.items()}
    handles: list[Artist] = []
    for (label, curve), (color, style) in zip(curves.items(), itertools.cycle(LOOKS), strict=False):
        handles += axes.plot(*curve, color=THEME[color], ls=style, lw=1.6, label=label)
    floors = _draw_floors(axes, comparison)
    set_log_scale(axes, np.concatenate([*(values for _, values in curves.values()), [*comparison.floors.values()]]))
    if comparison.shift_step is not None:
        axes.axvline(comparison.shift_step, color=THEME["muted"], lw=1.0, ls=":")
        place = axes.get_xaxis_transform()
        axes.text(comparison.shift_step, 0.98, " the text changes", color=THEME["muted"], va="top", transform=place)
    set_head(axes, f"Load imbalance by law: {comparison.name}", handles + floors)


def _draw_floors(axes: Axes, comparison: Comparison) -> list[Artist]:
    first, last = comparison.steps
    by_step = {
        "practical floor": comparison.floor_S,
        "chance floor": np.full(last + 1 - first, comparison.chance_floor),
    }
    handles: list[Artist] = []
    for name in comparison.floors:
        handles += axes.plot(
            np.arange(first, last + 1), by_step[name], color=THEME["muted"], lw=1.3, ls=FLOOR_STYLES[name], label=name
        )
    return handles
