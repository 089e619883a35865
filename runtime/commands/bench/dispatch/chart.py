"""The picture of `trimtab bench dispatch`: for each dtype, a step by phase above its bare matmuls and all-to-alls."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch

from runtime.commands.bench.dispatch.figures import LayerFigures
from runtime.report.chart_style import THEME, new_axes, set_head, write_png

PHASE_COLORS = {"experts": "blue", "dispatch": "orange", "combine": "green", "rest": "grey"}
LIMIT_COLORS = {"matmuls": "blue", "all-to-all": "orange"}
LIMIT_ALPHA = 0.45
BAR_HEIGHT, PAIR_HEIGHT = 0.8, 2.6
NOTE_SHARE = 0.4  # of the length of the bare bar: room for the note to its right
LEAST_SHARE = 0.035  # of the longest bar: a narrower segment has no room for its milliseconds


def write_chart(figures: dict[str, LayerFigures], lines: tuple[str, str], target: Path) -> None:
    """Write the PNG. lines: what was measured, for below the axis."""
    write_png(lambda figure: _draw(figure, figures, lines), figure_size(len(figures)), target)


def figure_size(num_dtypes: int) -> tuple[float, float]:
    """Inches: two bars for each dtype between the legend and the words below the axis."""
    return 9.2, 2.2 + 1.0 * num_dtypes


def _draw(figure: FigureBase, figures: dict[str, LayerFigures], lines: tuple[str, str]) -> None:
    axes = new_axes(figure, "milliseconds\n" + "\n".join(lines), "")
    # At small sizes the bare parts, timed one by one, can take longer than the step that overlaps them.
    step_ms = 1e3 * max(each.wall.measured for each in figures.values())
    bare_ms = 1e3 * max(sum(each.limits.values()) for each in figures.values())
    longest_ms = max(step_ms, bare_ms)
    ticks: dict[float, str] = {}
    for number, (dtype, each) in enumerate(figures.items()):
        y, y_bare = -number * PAIR_HEIGHT, -number * PAIR_HEIGHT - 1
        ticks |= {y: f"{dtype}, step", y_bare: "bare"}
        _draw_bar(axes, y, each.phases, PHASE_COLORS, longest_ms, f"{_figure(1e3 * each.wall.measured)} ms")
        over = 1 / (1 - each.shares["rest"])
        note = f"{_figure(1e3 * sum(each.limits.values()))} ms; the step takes {over:.2f} x that"
        _draw_bar(axes, y_bare, each.limits, LIMIT_COLORS, longest_ms, note, LIMIT_ALPHA)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)  # it would run through the milliseconds
    axes.set_xlim(0, max(1.12 * step_ms, (1 + NOTE_SHARE) * bare_ms))
    phases = [Patch(color=THEME[color], lw=0, label=name) for name, color in PHASE_COLORS.items()]
    bare = [
        Patch(color=THEME[color], lw=0, alpha=LIMIT_ALPHA, label=f"bare {name}") for name, color in LIMIT_COLORS.items()
    ]
    set_head(axes, "One step of the MoE layer, and what it cannot do without", phases + bare)


def _draw_bar(
    axes: Axes,
    y: float,
    seconds: dict[str, float],
    colors: dict[str, str],
    longest_ms: float,
    total: str,
    alpha: float = 1.0,
) -> None:
    start = 0.0
    for name, color in colors.items():
        width = 1e3 * seconds[name]
        axes.barh(y, width, left=start, height=BAR_HEIGHT, color=THEME[color], alpha=alpha, lw=0)
        if width >= LEAST_SHARE * longest_ms:
            axes.text(start + width / 2, y, _figure(width), ha="center", va="center", color=_ink(color, alpha))
        start += width
    axes.text(start + 0.01 * longest_ms, y, total, ha="left", va="center")


def _figure(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2g}"


def _ink(color: str, alpha: float) -> str:
    return "#ffffff" if alpha == 1.0 and color != "grey" else THEME["ink"]
