"""Every family on packed documents: loss and all gradients are those of the mask of a whole row."""

from dataclasses import replace

import pytest
import torch

from dispatch.exchange.local import LocalDispatcher
from tests.workers.model.attention.slow_masks import expect_equal, learn, starts_of, whole_masks
from tests.workers.model.families.hugging_face import CONFIGS, VOCAB_SIZE, make_model
from workers.model.decoder import Decoder
from workers.model.families import Settings, family_of
from workers.model.init import init_weights


def model_of(name: str) -> Decoder:
    theirs = make_model(name)
    settings = Settings({**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}, "config.json")
    config = replace(family_of(settings).read_config(settings), num_mtp_layers=0)
    model = Decoder(config, lambda: LocalDispatcher(config.moe.num_experts))
    init_weights(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # sinks, biases and norms too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_the_loss_and_gradients_of_the_mask(name: str) -> None:
    model, starts = model_of(name), starts_of([4, 4, 1, 3], [1, 1, 4, 6])
    ids = torch.randint(VOCAB_SIZE, starts.shape, generator=torch.Generator().manual_seed(0))
    with whole_masks():
        wanted = learn(model, ids, starts)
    expect_equal(learn(model, ids, starts), wanted)
    assert not torch.allclose(learn(model, ids, None)[0], wanted[0], rtol=1e-6)
