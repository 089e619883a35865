"""The common look of all PNG charts: colours, axes, legends, averaging, and writing the file.

It draws without pyplot, which has a global state and keeps every figure alive.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

# The palette of Okabe and Ito, safe for colour-blind readers.
THEME = {
    "ink": "#1b1f24",
    "muted": "#667080",
    "grid": "#e3e6ea",
    "blue": "#0072b2",
    "orange": "#d98200",
    "green": "#009e73",
    "red": "#d55e00",
    "pink": "#c06a9a",
    "grey": "#b4bac2",
}
SERIES = ("blue", "orange", "green", "pink")
# For charts of many curves: six colours that can be told apart, then the same with another line.
LOOKS = [(color, style) for style in ("-", "--", ":") for color in (*SERIES, "red", "ink")]
MAX_POINTS = 120  # of a curve; a longer one is averaged, since more points could not be told apart

Values = NDArray[np.float64]

_TEXT_SIZE, _TITLE_SIZE = 8.5, 10.5


def new_figure(draw: Callable[[FigureBase], None], size: tuple[float, float], *, facecolor: str = "none") -> Figure:
    """A figure of `size` inches, drawn by `draw` in the common style."""
    style: dict[Any, Any] = {
        "text.parse_math": False,  # A name such as $x$, of a layer or a run, is no formula.
        "font.family": ["DejaVu Sans"], "font.size": _TEXT_SIZE, "axes.labelsize": _TEXT_SIZE,
        "legend.fontsize": _TEXT_SIZE, "xtick.labelsize": _TEXT_SIZE, "ytick.labelsize": _TEXT_SIZE,
        "text.color": THEME["ink"], "axes.labelcolor": THEME["muted"], "axes.edgecolor": THEME["grey"],
        "xtick.color": THEME["grey"], "ytick.color": THEME["grey"], "xtick.labelcolor": THEME["muted"],
        "ytick.labelcolor": THEME["muted"], "axes.facecolor": "none",
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained", facecolor=facecolor)
        draw(figure)
    return figure


def write_png(draw: Callable[[FigureBase], None], size: tuple[float, float], target: Path, *, dpi: int = 130) -> None:
    """Write a figure of `size` inches on white as PNG, drawn by `draw` in the common style."""
    new_figure(draw, size, facecolor="#ffffff").savefig(target, format="png", dpi=dpi)


def new_axes(figure: FigureBase, x_label: str, y_label: str) -> Axes:
    """One plot for curves over steps."""
    axes: Axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=THEME["grid"], lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def set_title(axes: Axes, title: str, pad: float = 6) -> None:
    """A title above the left edge."""
    axes.set_title(title, loc="left", fontsize=_TITLE_SIZE, fontweight="bold", pad=pad)


def set_head(axes: Axes, title: str, handles: Sequence[Artist]) -> None:
    """Title and legend above the axes, where no curve can run through them."""
    columns = 4 if len(handles) <= 4 else 3
    set_title(axes, title, pad=8 + 14 * -(-len(handles) // columns))
    axes.legend(
        handles=list(handles), loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False,
        borderaxespad=0.1, borderpad=0.2, handlelength=1.3, handletextpad=0.5, columnspacing=1.3,
    )  # fmt: skip


def set_log_scale(axes: Axes, values: Values) -> None:
    """A log scale that fits the positive `values`, with plain numbers as labels. Without any the scale stays linear."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return
    axes.set_yscale("log")
    axes.set_ylim(positive.min() / 1.2, positive.max() * 1.2)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def set_rank_axis(axes: Axes, ticks: Sequence[int]) -> None:
    """A log scale of base 2 for numbers of ranks, with a plain number at each of `ticks`."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def bin_size(num_values: int, max_points: int = MAX_POINTS) -> int:
    """Steps that one point of `average` stands for."""
    return max(1, -(-num_values // max_points))


def average(x: NDArray[np.int64], y: Values, max_points: int = MAX_POINTS) -> tuple[Values, Values]:
    """At most `max_points` points, each the mean of equally many steps; NaN where a whole bin is NaN."""
    starts = np.arange(0, len(x), bin_size(len(x), max_points))
    if not starts.size:
        return np.zeros(0), np.zeros(0)
    known = np.isfinite(y)
    totals, counts = np.add.reduceat(np.where(known, y, 0.0), starts), np.add.reduceat(known.astype(float), starts)
    means = np.divide(totals, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    middles = np.add.reduceat(x.astype(float), starts) / np.add.reduceat(np.ones(len(x)), starts)
    return middles, means


def step_label(num_steps: int) -> str:
    """Label of an x axis whose curves are averaged by `average`."""
    size = bin_size(num_steps)
    return f"step (each point is the mean of {size})" if size > 1 else "step"
