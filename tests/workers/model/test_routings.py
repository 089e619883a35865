"""A decoder that is given the experts of every layer makes the recorded step again, under recompute too."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dispatch import Routing, recorded_routing
from dispatch.balance import read_counts, routers_of
from dispatch.config import ScheduleConfig
from dispatch.errors import InvalidValue
from tests.ranks import run_ranks
from tests.workers.model.test_decoder import build, tokens
from tests.workers.model.token_loss import token_nll_sum
from tests.workers.training.test_gradients import form_groups
from tests.workers.training.test_sharding import build as build_sharded
from workers.distributed.sharded import local_rows
from workers.model.decoder import Decoder
from workers.model.loss import after_next


def step(model: Decoder, routings: list[Any] | None, seed: int = 0) -> dict[str, Tensor]:
    """Logits of both heads and all gradients, which are cleared."""
    ids = tokens(seq_len=8, seed=seed)
    logits, further = model(ids[:, :-1], next_ids=ids[:, 1:], routings=routings)
    (token_nll_sum(logits, ids[:, 1:]) + token_nll_sum(further, after_next(ids[:, 1:]))).backward()
    found = {"logits": logits.detach(), "further": further.detach()}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def move_biases(model: Decoder) -> None:
    for router in routers_of(model).values():
        router.expert_bias_E.copy_(torch.linspace(1, -1, router.num_experts))
        router.tokens_per_expert_E.zero_()


@pytest.mark.parametrize("recompute", ["none", "attention", "experts", "full"])
def test_a_replay_of_all_layers_is_the_recorded_step_bit_for_bit(recompute: str) -> None:
    model = build(recompute=recompute, num_mtp_layers=1)
    with recorded_routing(model) as routings:
        recorded = step(model, None)
    assert len(routings) == 3  # two layers after a dense one, and that of the MTP
    move_biases(model)
    replayed = step(model, routings)  # backward is outside of any context: a recompute keeps to the same experts
    assert recorded.keys() == replayed.keys()
    for name, value in recorded.items():
        assert torch.equal(value, replayed[name]), name
    assert not read_counts(routers_of(model)).any()
    assert not torch.equal(step(model, None)["logits"], recorded["logits"])  # the moved bias chooses others


def test_a_layer_without_a_routing_chooses_and_counts_itself() -> None:
    model, ids = build(), tokens()
    with recorded_routing(model) as routings:
        logits = model(ids)
    move_biases(model)
    for router in routers_of(model).values():
        router.expert_bias_E.zero_()
    assert torch.equal(model(ids, routings=[routings[0], None]), logits)
    assert [int(router.tokens_per_expert_E.sum()) for router in routers_of(model).values()] == [0, ids.numel() * 2]


def test_there_must_be_as_many_routings_as_layers_that_are_called() -> None:
    model, ids = build(num_mtp_layers=1), tokens()
    routings = [Routing(torch.arange(2).repeat(ids.numel(), 1))] * 3
    model(ids, routings=routings[:2])
    with pytest.raises(InvalidValue, match="routings has 3 entries; this forward calls 2 MoE layers"):
        model(ids, routings=routings)


def replay_sharded(rank: int, world_size: int, ep_size: int, shard: str) -> None:
    groups = form_groups(rank, world_size, ep_size)
    model = build_sharded(groups, shard, ScheduleConfig(), (), recompute="full", num_mtp_layers=1)
    with recorded_routing(model) as routings:
        recorded = step(model, None, rank)
    move_biases(model)
    replayed = step(model, routings, rank)
    assert recorded.keys() == replayed.keys()
    for name, value in recorded.items():
        assert torch.equal(local_rows(value)[0], local_rows(replayed[name])[0]), name
    assert not read_counts(routers_of(model)).any()


@pytest.mark.parametrize(("ep_size", "shard"), [(2, "none"), (2, "full"), (1, "full")])
def test_a_replay_between_ranks_is_the_recorded_step_also_where_states_are_sharded(ep_size: int, shard: str) -> None:
    run_ranks(2, replay_sharded, ep_size, shard)
