"""The pictures of a run, each drawn into a figure or subfigure of the caller's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch

from runtime.report.chart_style import (
    SERIES,
    THEME,
    Values,
    average,
    bin_size,
    new_axes,
    set_head,
    set_log_scale,
    step_label,
)
from runtime.report.load_map import draw_load_map
from runtime.report.run_record import MAX_VIO_DEFINITION, RunRecord, clip, floats, layer_labels
from runtime.terminal.quantities import percent

PARTS = {  # of a step, in seconds of the training thread, none inside another
    "experts_s": ("experts", "blue"),
    "dispatch_s": ("dispatch", "orange"),
    "combine_s": ("combine", "green"),
    "bias_update_s": ("bias update", "pink"),
    "control_wait_s": ("control wait", "red"),
}
LOSS_POINTS = 60
MAX_BIAS_SAMPLES = 240


@dataclass(frozen=True)
class Chart:
    """One chart of the report. shows: whether a run has the data it draws. wide: it takes the width of the page."""

    title: str
    explanation: str
    draw: Callable[[FigureBase, RunRecord], None]
    shows: Callable[[RunRecord], bool]
    wide: bool = False


def draw_loss(figure: FigureBase, record: RunRecord) -> None:
    """Training and held-out loss over steps."""
    axes = new_axes(figure, "step", "nats per token")
    loss = record.column("loss")
    handles: list[Artist] = []
    if (size := bin_size(len(loss), LOSS_POINTS)) > 1:
        handles += axes.plot(record.steps, loss, color=THEME["grey"], lw=0.8, label="training, each step")
    if len(loss):
        label = f"mean of {size} steps" if size > 1 else "training"
        marker = "o" if len(loss) == 1 else None
        curve = average(record.steps, loss, LOSS_POINTS)
        handles += axes.plot(*curve, color=THEME["blue"], marker=marker, ms=4, lw=1.8, label=label)
    if record.evals:
        values = floats(line["val_loss"] for line in record.evals)
        handles += _plot_evals(axes, record.eval_steps, values, color=THEME["orange"], ms=4, lw=1.2, label="held out")
    set_head(axes, "Loss", handles)


def draw_bits_per_byte(figure: FigureBase, record: RunRecord) -> None:
    """Held-out bits per byte over steps, for all text and for the first sources."""
    axes = new_axes(figure, "step", "bits per byte")
    whole = floats(line["val_bits_per_byte"] for line in record.evals)
    handles = _plot_evals(
        axes, record.eval_steps, whole, color=THEME["ink"], ms=3.5, lw=1.8, label="all text", zorder=3
    )
    per_source = [line.get("val_bits_per_byte_per_source") or {} for line in record.evals]
    for name, color in zip(per_source[-1], SERIES, strict=False):
        values = floats(bits.get(name) for bits in per_source)
        handles += _plot_evals(axes, record.eval_steps, values, color=THEME[color], ms=3, lw=1.2, label=clip(name))
    set_head(axes, "Held-out bits per byte", handles)


def _plot_evals(axes: Axes, steps: Sequence[int], values: Values, **look: Any) -> list[Artist]:
    """A point for each evaluation, joined but for that of the untrained model.

    The loss falls steeply after step 0: a straight line from there to the next evaluation would run where it never was.
    """
    joined = slice(1 if len(steps) > 1 and steps[0] == 0 else 0, None)
    axes.plot(steps, values, "o", **look | {"label": "_"})
    return list(axes.plot(steps[joined], values[joined], "o-", **look))


def draw_max_vio(figure: FigureBase, record: RunRecord) -> None:
    """MaxVio of each layer over steps, their mean, and what chance alone would show."""
    axes = new_axes(figure, step_label(len(record.steps)), "MaxVio_batch (log scale)")
    layers, labels = record.max_vio_per_layer(), layer_labels(record)
    few = len(labels) <= len(SERIES)
    colors = [THEME[name] for name in SERIES] if few else colormaps["viridis"](np.linspace(0.35, 0.8, len(labels)))
    curves = [average(record.steps, values) for values in layers.T]
    lines: list[Artist] = []
    for curve, color, label in zip(curves, colors, labels, strict=False):
        lines += axes.plot(*curve, color=color, lw=1.0 if few else 0.8, alpha=0.75, label=label)
    mean = average(record.steps, record.column("max_vio_batch"))
    floor = record.column("max_vio_floor")
    handles: list[Artist] = list(axes.plot(*mean, color=THEME["ink"], lw=2.0, label="mean of layers"))
    handles += axes.plot(record.steps, floor, "--", color=THEME["red"], lw=1.4, label="floor by chance")
    set_log_scale(axes, np.concatenate([values for _, values in curves] + [floor]))
    set_head(axes, "Load imbalance of a batch", handles + (lines if few else [lines[0], lines[-1]]))


def draw_bias(figure: FigureBase, record: RunRecord) -> None:
    """How far the selection biases spread over steps."""
    axes = new_axes(figure, "step", "selection bias")
    steps, bias = record.history.steps, record.history.bias
    # A sample of steps: all of a long run would be its whole history in memory.
    sample = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_BIAS_SAMPLES)).astype(int))
    lowest, low, middle, high, highest = np.quantile(bias[sample], [0, 0.1, 0.5, 0.9, 1], axis=1)
    x, blue = steps[sample], THEME["blue"]
    handles: list[Artist] = [
        axes.fill_between(x, lowest, highest, color=blue, alpha=0.25, lw=0, label="all experts"),
        axes.fill_between(x, low, high, color=blue, alpha=0.45, lw=0, label="middle 80 %"),
        *axes.plot(x, middle, color=blue, lw=1.6, label="median"),
    ]
    set_head(axes, "Spread of the bias", handles)


def draw_time(figure: FigureBase, record: RunRecord) -> None:
    """Milliseconds of a step by what they were spent on, over steps."""
    num_points = 80
    axes = new_axes(figure, step_label(len(record.steps), num_points), "milliseconds per step")
    step_s = np.nan_to_num(record.column("step_s"))
    parts = [(np.nan_to_num(record.column(field)), *PARTS[field]) for field in PARTS]
    rest = np.clip(step_s - np.sum([seconds for seconds, *_ in parts], axis=0), 0, None)
    parts.append((rest, "everything else", "grey"))
    curves = [average(record.steps, seconds * 1e3, num_points) for seconds, *_ in parts]
    x, heights = curves[0][0], np.array([curve for _, curve in curves])
    axes.stackplot(x, heights, colors=[THEME[color] for *_, color in parts], lw=0)
    # The first step warms up and would flatten all others.
    axes.set_ylim(0, 1.1 * float(heights.sum(0)[1:].max()))
    axes.set_xlim(x[0], x[-1])
    whole = float(step_s.sum()) or 1.0
    labels = [f"{label} {percent(float(seconds.sum()) / whole)}" for seconds, label, _ in parts]
    patches = [Patch(color=THEME[color], lw=0, label=text) for (*_, color), text in zip(parts, labels, strict=True)]
    set_head(axes, "Where the time of a step went", patches)


def draw_grad_norm(figure: FigureBase, record: RunRecord) -> None:
    """Gradient norm before clipping, over steps."""
    axes = new_axes(figure, "step", "gradient norm (log scale)")
    norm = record.column("grad_norm")
    handles: list[Artist] = list(axes.plot(record.steps, norm, color=THEME["blue"], lw=1.0, label="before clipping"))
    set_log_scale(axes, norm)
    if skipped := record.skipped_steps:
        top = [0.96] * len(skipped)  # of the height of the plot
        place = axes.get_xaxis_transform()
        handles += axes.plot(skipped, top, "v", color=THEME["red"], ms=6, transform=place, label="skipped, not finite")
    set_head(axes, "Gradient norm", handles)


def _has_curve(record: RunRecord) -> bool:
    return len(record.train) > 1


def _has_bias(record: RunRecord) -> bool:
    return len(record.history.steps) > 1 and bool(record.history.bias[-1].any())


CHARTS = (
    Chart(
        "Loss",
        "Cross-entropy of the next token: of each training batch, and of held-out text.",
        draw_loss,
        lambda record: bool(record.train or record.evals),
    ),
    Chart(
        "Held-out bits per byte",
        "Compression of text that training never saw; comparable between tokenizers.",
        draw_bits_per_byte,
        lambda record: len(record.evals) > 1,
    ),
    Chart(
        "Load imbalance of a batch",
        f"{MAX_VIO_DEFINITION}, of one global batch; 0 is perfect. Perfectly balanced routing with independent tokens "
        "would still show the floor by chance.",
        draw_max_vio,
        lambda record: _has_curve(record) and record.has_moe,
    ),
    Chart(
        "Spread of the bias",
        "What the law adds to the router's scores when experts are chosen. It is never in a weight or a gradient.",
        draw_bias,
        _has_bias,
    ),
    Chart(
        "Load of every expert",
        "Tokens of each expert against the mean of its layer: pale is balanced, black with a cross got no token. "
        "MaxVio here is that of the summed load of these steps, mean of layers.",
        draw_load_map,
        lambda record: len(record.history.steps) > 0 and record.has_moe,
        wide=True,
    ),
    Chart(
        "Where the time of a step went",
        "Training thread of rank 0, forward and backward together. Everything else is attention, dense layers, "
        "gradient reduction and optimizer.",
        draw_time,
        _has_curve,
    ),
    Chart(
        "Gradient norm",
        "Norm of the whole model's gradient; the same on any number of ranks.",
        draw_grad_norm,
        _has_curve,
    ),
)


def draw_overview(figure: FigureBase, record: RunRecord) -> None:
    """Loss, imbalance and time above the load map, for one picture of a run."""
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 2), hspace=0.05)[:, 0]
    for part, draw in zip(
        upper.subfigures(1, 3, squeeze=False, wspace=0.04)[0], (draw_loss, draw_max_vio, draw_time), strict=True
    ):
        draw(part, record)
    draw_load_map(lower, record)
