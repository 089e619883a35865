"""The picture of `trimtab bench coordinator`: time and bytes of a step against the number of ranks."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from runtime.commands.bench.coordinator.load import percentile
from runtime.commands.bench.coordinator.measurement import ControlMeasurement
from runtime.report.chart_style import THEME, new_axes, set_head, set_log_scale, set_rank_axis, write_png

TREE, RING, MEASURED = "green", "orange", "blue"


def write_chart(measured: ControlMeasurement, target: Path) -> None:
    """Write the PNG."""
    write_png(lambda figure: _draw(figure, measured), (9.6, 3.9), target)


def _draw(figure: FigureBase, measured: ControlMeasurement) -> None:
    left, right = figure.subfigures(1, 2)  # type: ignore[misc] # two of them are an array
    case = measured.case
    what = f"ranks\nlaw {case.law}, {case.layers} x {case.experts} experts"
    _draw_seconds(new_axes(left, what, "ms a step"), measured)
    beside = "modelled; with the counts travel 32 bytes for each rank"
    _draw_bytes(new_axes(right, f"ranks\n{beside}", "KiB a step"), measured)


def _draw_seconds(axes: Axes, measured: ControlMeasurement) -> None:
    rounds, rows = measured.ranks.rounds, measured.modelled
    sizes = [row.world_size for row in rounds]
    middle = np.array([1e3 * percentile(row.seconds, 50) for row in rounds])
    spread = np.array([[1e3 * percentile(row.seconds, share) for row in rounds] for share in (5, 95)])
    whiskers = np.abs(spread - middle)
    axes.errorbar(sizes, middle, whiskers, fmt="o", ms=4.5, color=THEME[MEASURED], capsize=2, zorder=3)
    for color, name in ((TREE, "tree_s"), (RING, "ring_s")):
        axes.plot([row.world_size for row in rows], [1e3 * getattr(row, name) for row in rows], color=THEME[color])
    every = [*middle, *(1e3 * value for row in rows for value in (row.tree_s, row.ring_s))]
    set_log_scale(axes, np.array(every))
    _set_ranks(axes, measured)
    handles = [
        Line2D([], [], marker="o", ms=4.5, lw=0, color=THEME[MEASURED], label="measured, 5 to 95 %"),
        Line2D([], [], color=THEME[TREE], label="model: tree"),
        Line2D([], [], color=THEME[RING], label="model: ring (gloo)"),
    ]
    set_head(axes, "From the counts to the next bias", handles)


def _draw_bytes(axes: Axes, measured: ControlMeasurement) -> None:
    rows = measured.modelled
    axes.plot([row.world_size for row in rows], [row.sent_bytes / 1024 for row in rows], color=THEME[TREE])
    report = measured.loads[measured.case.law].report_bytes / 1024
    axes.axhline(report, color=THEME["grey"], ls="--", lw=1)
    axes.set_ylim(0, 1.1 * max([report, *(row.sent_bytes / 1024 for row in rows)]))
    _set_ranks(axes, measured)
    handles = [
        Line2D([], [], color=THEME[TREE], label="tree or ring"),
        Line2D([], [], color=THEME["grey"], ls="--", lw=1, label="the report of rank 0"),
    ]
    set_head(axes, "What a rank sends", handles)


def _set_ranks(axes: Axes, measured: ControlMeasurement) -> None:
    sizes = sorted({*(row.world_size for row in measured.modelled), *(row.world_size for row in measured.ranks.rounds)})
    set_rank_axis(axes, sizes[:: 2 if len(sizes) > 8 else 1])
