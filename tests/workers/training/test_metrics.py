"""One line of metrics from one evaluation, with loads written out."""

import pytest
import torch

from dispatch.layout import LoadLayout
from workers.data.mix import MixSchedule
from workers.training.evaluation import Evaluation
from workers.training.metrics import eval_line

LAYOUT = LoadLayout(names=("a", "b"), num_experts=(2, 4), balanced=(True, True))
#                        layer a   layer b: experts 0 to 3
HELD_OUT = torch.tensor(
    [
        [30, 10, 10, 10, 10, 10],  # source 0: 40 choices a layer
        [5, 15, 0, 0, 20, 0],
    ]
)  # source 1: 20
TRAINED = torch.tensor([8, 8, 16, 0, 0, 0])


def line(mix: tuple[float, ...], load_SN: torch.Tensor = HELD_OUT) -> dict:
    evaluation = Evaluation(1.0, 2.0, {"x": 2.0}, 15, load_SN, 0.1)
    return eval_line(7, evaluation, TRAINED, LAYOUT, mix)


def test_held_out_max_vio_is_that_of_the_held_out_load() -> None:
    found = line(())
    # Of all sources 35, 25 | 10, 10, 30, 10: 35 / 30 - 1 and 30 / 15 - 1.
    assert found["max_vio_held_out_per_layer"] == pytest.approx([1 / 6, 1.0])
    assert found["max_vio_held_out"] == pytest.approx((1 / 6 + 1) / 2)
    assert found["max_vio_global_per_layer"] == [0.0, 3.0]  # that of the training load stays what it was
    assert found["max_vio_held_out_in_mix"] is None


def test_held_out_max_vio_in_a_mix_weighs_the_sources_as_it_does() -> None:
    # Shares 0.75, 0.25 | 0.25 each, and 0.25, 0.75 | 0, 0, 1, 0. Half of each: 0.5, 0.5 | 0.125, 0.125, 0.625, 0.125.
    assert line((3.0, 3.0))["max_vio_held_out_in_mix"] == pytest.approx((0 + 1.5) / 2)
    assert line((1.0, 0.0))["max_vio_held_out_in_mix"] == pytest.approx((0.5 + 0.0) / 2)
    unread = torch.stack([HELD_OUT[0], torch.zeros(6, dtype=torch.int64)])
    assert line((1.0, 1.0), unread)["max_vio_held_out_in_mix"] == pytest.approx((0.5 + 0.0) / 2)


def test_weights_of_a_step_are_those_that_drew_it() -> None:
    schedule = MixSchedule((1, 2), (2, 1), shift_at=5)
    assert [schedule.weights_at(step) for step in (0, 4, 5, 9)] == [(1, 2), (1, 2), (2, 1), (2, 1)]
    assert MixSchedule((1, 2)).weights_at(9) == (1, 2)
    assert MixSchedule().weights_at(9) == ()
