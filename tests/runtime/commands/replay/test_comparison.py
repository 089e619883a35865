"""Figures, table and picture of laws, on loads that are written out."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dispatch.config import RouterConfig
from dispatch.laws import BalanceConfig
from dispatch.laws.load_metrics import max_vio
from dispatch.layout import LoadLayout
from dispatch.routing.selection import biased_scores, count_by_expert, ordered_topk
from runtime.commands.replay.chart import LOOKS, write_chart
from runtime.commands.replay.comparison import Comparison, compare
from runtime.commands.replay.figures import first_balanced
from runtime.commands.replay.floors import _balancing_bias, _floor_of, floor_by_step
from runtime.commands.replay.play import SimulatedLaw
from runtime.commands.replay.simulation import RouterSimulation
from runtime.commands.replay.table import as_table


class FlatTrace:
    """16 steps of two layers of 2 experts; 4 tokens of equal scores; another text from step 11 on, if `shifts`."""

    name = "flat"
    layout = LoadLayout(("a", "b"), (2, 2), (True, True))
    router = RouterConfig(num_experts=2, top_k=1)
    steps = range(1, 17)

    def __init__(self, shift_step: int | None) -> None:
        self.shift_step = shift_step

    def scores(self, _step: int) -> list[torch.Tensor]:
        return [torch.full((4, 2), 0.5)] * 2


def simulated(*vio: float) -> SimulatedLaw:
    """A load with this MaxVio in each step, the first expert ahead in odd steps and the second in even ones."""
    ahead = [(round(100 * (1 + each)), round(100 * (1 - each))) for each in vio]
    counts = [(pair if step % 2 else pair[::-1]) * 2 for step, pair in enumerate(ahead)]
    num_steps = len(vio)
    return SimulatedLaw(
        BalanceConfig(law="sign"), np.array(counts), np.zeros((num_steps, 4), np.float32), np.full(num_steps, 0.02)
    )


# Five steps are below 0.2 on average from the third step on, and after the shift from the second on.
CURVE = (0.9, 0.8, *[0.1] * 8, 0.9, *[0.1] * 5)


def compared(shift_step: int | None = 11) -> Comparison:
    laws = {"quick": simulated(*CURVE), "never": simulated(*[0.9] * 16)}
    return compare(FlatTrace(shift_step), laws, threshold=0.2)


def test_figures_say_how_near_and_how_soon() -> None:
    found = compared()
    quick, never = (found.laws[label].figures for label in ("quick", "never"))
    assert (quick.balanced_after, quick.recovered_after) == (2, 1)
    assert (never.balanced_after, never.recovered_after) == (None, None)
    assert found.steady == (9, 10) and found.steps == (1, 16)
    assert quick.max_vio_batch == pytest.approx(0.1) and quick.max_vio_global == pytest.approx(0)
    assert never.max_vio_batch == pytest.approx(0.9) and quick.regret == pytest.approx(0.02)
    assert found.laws["quick"].max_vio_S == pytest.approx(CURVE)


def test_a_law_that_loses_a_balance_it_found_has_not_balanced_yet() -> None:
    curve = np.array([0.1] * 8 + [0.9] * 40 + [0.1] * 20)
    assert first_balanced(curve / 0.2) == 48
    assert first_balanced(np.array([0.1] * 20 + [0.9] + [0.1] * 40) / 0.2) == 0  # one step of 61 does not matter
    assert first_balanced(np.array([0.1] * 6 + [0.9] * 9) / 0.2) is None


def test_without_a_shift_the_end_is_the_steady_part() -> None:
    found = compared(None)
    assert found.steady == (13, 16) and found.laws["quick"].figures.recovered_after is None


def test_a_trace_too_short_for_the_practical_floor_says_so() -> None:
    found = compared()  # six steps follow the shift
    assert np.isnan(found.floor_S).all() and found.to_json()["practical_floor_by_step"] is None
    assert list(found.floors) == ["chance floor"]
    assert np.isfinite(compared(None).floor_S).all()


class MovingTrace(FlatTrace):
    """40 steps of 256 tokens; up to step 20 one expert leads, by another margin in each step; then neither."""

    steps = range(1, 41)

    def scores(self, step: int) -> list[torch.Tensor]:
        scores_TE = 0.4 + 0.2 * torch.rand(256, 2, generator=torch.Generator().manual_seed(step))
        scores_TE[:, 0] += 0.1 * (step % 2) * (step <= 20)
        return [scores_TE] * 2


def test_the_practical_floor_is_high_where_the_router_moves() -> None:
    trace = MovingTrace(None)
    floor_S = floor_by_step(trace)
    assert floor_S[:12].min() > 2 * floor_S[30:].max()
    # A law whose MaxVio is just above the floor is balanced all along, though it leaves much at first.
    near = compare(trace, {"near": simulated(*(1.2 * floor_S).tolist())}).laws["near"].figures
    assert near.balanced_after == 0


def test_a_step_is_not_balanced_by_a_bias_that_has_seen_it() -> None:
    # Of two steps the first leans: 7 of 8 of its tokens prefer one expert, and the other step knows nothing of that.
    assert _floor_of(MovingTrace(None), 19, range(19, 21)) == pytest.approx(0.75, abs=0.1)


def test_the_practical_floor_knows_a_balancing_bias_where_groups_limit_the_choice() -> None:
    router = RouterConfig(num_experts=32, top_k=6, num_groups=8, groups_kept=3, scores_per_group=2)
    trace = RouterSimulation(seed=1, num_steps=8, shift_step=None, router=router, num_sequences=64)
    scores_TE = torch.cat([trace.scores(step)[0][::4] for step in trace.steps])
    topk_ids_TK = ordered_topk(
        biased_scores(scores_TE, _balancing_bias(scores_TE, router), **router.groups), router.top_k
    )
    assert max_vio(count_by_expert(topk_ids_TK, 32)) < 0.05


def text_of(comparison: Comparison) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(as_table(comparison))
    return captured.get()


def test_the_table_has_a_row_for_each_law_and_floor() -> None:
    rows = {line.split("  ")[0]: line.split()[1:] for line in text_of(compared()).splitlines()}
    assert rows["quick"] == ["0.100", "0", "2", "1", "2.0", "%"]
    assert rows["never"] == ["0.900", "0", "never", "never", "2.0", "%"]
    assert "recover" in text_of(compared()) and "recover" not in text_of(compared(None))
    assert "practical floor" in text_of(compared(None)) and "chance floor" in text_of(compared(None))


def test_the_picture_shows_every_law_floor_and_the_shift(tmp_path: Path) -> None:
    from runtime.commands.replay.chart import draw_comparison
    from runtime.report.chart_style import new_figure

    found = compared()
    figure = new_figure(lambda figure: draw_comparison(figure, found), (9, 4))
    [axes] = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["quick", "never", *found.floors]
    assert [text.get_text().strip() for text in axes.texts] == ["the text changes"]
    assert np.allclose(axes.lines[0].get_ydata(), CURVE)
    write_chart(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_no_two_laws_look_alike() -> None:
    assert len(LOOKS) == len(set(LOOKS)) >= 12  # ten laws of `bench balance`, and some
    assert all(before[0] != after[0] for before, after in itertools.pairwise(LOOKS))
