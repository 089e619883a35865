import math

import pytest
import torch

from dispatch.laws.load_metrics import max_vio, max_vio_floor, max_vio_per_layer, num_dead_experts
from dispatch.layout import LoadLayout


def test_max_vio_of_hand_worked_loads():  # P18
    assert max_vio(torch.tensor([5, 5, 5, 5])) == 0.0
    assert max_vio(torch.tensor([8, 0, 0, 0])) == 3.0  # all to one of four: E - 1
    assert max_vio(torch.tensor([6, 2, 4, 0])) == 1.0  # 6 over a mean of 3
    assert max_vio(torch.tensor([0, 0])) == 0.0


def test_layers_are_measured_apart():  # P18
    layout = LoadLayout(("a", "b"), (2, 3), (True, True))
    assert max_vio_per_layer(torch.tensor([1, 3, 2, 2, 2]), layout) == [0.5, 0.0]
    assert num_dead_experts(torch.tensor([1, 0, 2, 0, 0])) == 3


def test_floor_equals_the_published_figure():
    assert max_vio_floor(8192, 64, 6) == pytest.approx(0.099, abs=5e-4)
    assert max_vio_floor(8192, 1, 1) == 0.0


def test_floor_is_what_random_balanced_routing_shows():
    generator = torch.Generator().manual_seed(0)
    seen = [
        max_vio(torch.bincount(torch.rand(2048, 16, generator=generator).topk(4).indices.flatten(), minlength=16))
        for _ in range(40)
    ]
    assert math.isclose(sum(seen) / len(seen), max_vio_floor(2048, 16, 4), rel_tol=0.35)
