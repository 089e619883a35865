"""A simulation as a picture: what imbalance costs against MaxVio, and against the number of ranks."""

import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from runtime.commands.plan.simulate.report import Report
from runtime.report.chart_style import LOOKS, THEME, new_axes, set_head, set_rank_axis, write_png


def write_chart(report: Report, target: Path) -> None:
    """Write the PNG."""
    write_png(lambda figure: _draw(figure, report), (9.6, 4.2), target)


def _draw(figure: FigureBase, report: Report) -> None:
    left, right = figure.subfigures(1, 2)  # type: ignore[misc] # two of them are an array
    name = Path(report.subject.name).stem
    _draw_vios(new_axes(left, f"MaxVio\n{name}, {report.hardware.name}", "step, times a balanced one"), report)
    _draw_worlds(new_axes(right, "ranks", "step, times a balanced one"), report)


def _draw_vios(axes: Axes, report: Report) -> None:
    handles = []
    for world, (color, style) in zip(report.worlds, itertools.cycle(LOOKS), strict=False):
        label = f"{world.world_size:,} (EP {world.ep_size})"
        points = [(each.max_vio, each.times_balanced) for each in world.costs]
        handles += axes.plot(*zip(*points, strict=True), color=THEME[color], ls=style, marker="o", ms=3, label=label)
    for law, (color, _) in zip(report.laws, reversed(LOOKS[:6]), strict=False):
        handles += axes.plot(law.max_vio, law.steady_times, marker="D", ms=6, lw=0, color=THEME[color], label=law.law)
    axes.set_ylim(bottom=1)
    set_head(axes, "Cost of imbalance by MaxVio", handles)


def _draw_worlds(axes: Axes, report: Report) -> None:
    sizes = [world.world_size for world in report.worlds]
    handles = []
    for index, (color, style) in zip(range(len(report.planned.costs)), itertools.cycle(LOOKS), strict=False):
        label = f"MaxVio {report.planned.costs[index].max_vio:g}"
        values = [world.costs[index].times_balanced for world in report.worlds]
        handles += axes.plot(sizes, values, color=THEME[color], ls=style, marker="o", ms=3, label=label)
    set_rank_axis(axes, sizes)
    axes.set_ylim(bottom=1)
    set_head(axes, "Cost of imbalance by world size", handles)
