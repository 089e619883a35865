"""On the meta device a model has its names, shapes and dtypes, and no weight is drawn."""

import torch
from torch import nn

from workers.model.meta_device import meta_device


def test_modules_are_on_meta_and_the_generator_has_not_moved():
    before = torch.random.get_rng_state()
    with meta_device():
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.RMSNorm(3))
        table = nn.init.normal_(zeros := torch.zeros(2, 3, device="cpu"))
    assert {name: (tuple(value.shape), value.device.type) for name, value in model.named_parameters()} == {
        "0.weight": ((7, 4), "meta"),
        "1.weight": ((3, 4), "meta"),
        "1.bias": ((3,), "meta"),
        "2.weight": ((3,), "meta"),
    }
    assert table is zeros
    assert not zeros.any()
    assert torch.equal(torch.random.get_rng_state(), before)
