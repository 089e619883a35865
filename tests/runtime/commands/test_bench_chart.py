"""The picture of `trimtab bench dispatch` at a size whose bare parts take longer than the step."""

import warnings

from runtime.commands.bench.dispatch.chart import _draw, figure_size
from runtime.commands.bench.dispatch.figures import LayerFigures, Pair
from runtime.report.chart_style import new_figure


def figures() -> LayerFigures:
    """A step of 17 ms; its bare matmuls take 9 ms and its bare all-to-all 50 ms."""
    seconds = {"dispatch": 3e-3, "experts": 9e-3, "combine": 3e-3, "rest": 2e-3}
    one = Pair(1.0, 1.0, 1.0)
    return LayerFigures(
        phases=seconds, wall=Pair(17e-3, 9e-3, 17 / 9), cpu=one, flops=one, exchange=Pair(6e-3, 50e-3, 0.12),
        bandwidth=None, wire_share=50 / 17, sent={}, floor={}, busiest_over_mean=1.0, allocated_bytes=0,
        resident_bytes=None, others={},
    )  # fmt: skip


def test_the_longest_bar_and_all_words_are_inside_the_picture() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a layout that does not fit; not of others' garbage
        figure = new_figure(lambda figure: _draw(figure, {"float32": figures()}, ("sizes", "ranks")), figure_size(1))
        figure.draw_without_rendering()
    (axes,) = figure.axes
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) < axes.get_xlim()[1]
    legend = axes.get_legend()
    assert legend is not None
    for artist in (*axes.texts, axes.title, axes._left_title, legend, axes.xaxis.label):
        box = artist.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, artist
