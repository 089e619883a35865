"""The heat map of loads: layers × experts, at the start and at the end of a run."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from runtime.report.chart_style import THEME, Values, set_title
from runtime.report.run_record import RunRecord, layer_labels
from runtime.terminal.quantities import three_digits

MAX_STEPS = 10  # loads of this many steps are summed at each end
MAX_LABELS = 14
LOAD_RANGE = 4.0  # colours saturate at a quarter and at four times the mean load
MAX_CROSSES = 200  # of experts without load; more are a pattern that black alone shows


def draw_load_map(figure: FigureBase, record: RunRecord) -> None:
    """Load of every expert of every layer against the layer's mean. One map only of a single step."""
    counts, steps = record.history.counts, record.history.steps
    num = min(MAX_STEPS, max(1, len(steps) // 2))
    ends = [("Load at the start", slice(0, num)), ("Load at the end", slice(len(steps) - num, len(steps)))]
    ends = ends[: len(steps)]
    all_axes = figure.subplots(1, len(ends), sharey=True, squeeze=False)[0]
    for axes, (title, where) in zip(all_axes, ends, strict=True):
        shares = load_shares(counts[where].sum(0), record.history.layout.slices)
        _draw_map(axes, shares)
        between = f"step {steps[where][0]}" if num == 1 else f"steps {steps[where][0]} to {steps[where][-1]}"
        set_title(axes, f"{title}, {between}: MaxVio {three_digits(float(np.nanmax(shares, axis=1).mean() - 1))}")
    labels = layer_labels(record)
    every = -(-len(labels) // MAX_LABELS)
    all_axes[0].set_yticks(range(0, len(labels), every), labels[::every])
    bar = figure.colorbar(_color_scale(), ax=list(all_axes), pad=0.015, aspect=12, fraction=0.04)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["≤ ¼×", "½×", "mean", "2×", "≥ 4×"])
    bar.minorticks_off()
    bar.outline.set_visible(False)


def load_shares(counts_N: NDArray[np.int64], slices: Sequence[slice]) -> Values:
    """Each expert's load over its layer's mean: (layers, most experts). NaN where a layer has fewer; 1 without load."""
    shares = np.full((len(slices), max(where.stop - where.start for where in slices)), np.nan)
    for row, where in zip(shares, slices, strict=True):
        load_E = counts_N[where]
        row[: len(load_E)] = load_E / load_E.mean() if load_E.any() else 1.0
    return shares


def _draw_map(axes: Axes, shares: Values) -> None:
    colors = _color_scale().to_rgba(np.clip(np.nan_to_num(shares, nan=1.0), 1 / LOAD_RANGE, LOAD_RANGE))
    dead = shares == 0
    colors[dead, :3] = to_rgb(THEME["ink"])
    colors[np.isnan(shares), 3] = 0
    # "none" keeps one pixel a cell, which stays sharp at any size.
    axes.imshow(colors, aspect="auto", interpolation="none")
    if dead.sum() <= MAX_CROSSES:
        axes.plot(*np.nonzero(dead)[::-1], "x", color="#ffffff", ms=4, mew=1)
    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _color_scale() -> ScalarMappable:
    # Diverging around the mean, blue to red: safe for colour-blind readers.
    return ScalarMappable(LogNorm(1 / LOAD_RANGE, LOAD_RANGE), colormaps["RdBu_r"])
