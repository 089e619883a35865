"""Bytes of the exchanges against the meter of real layers on gloo ranks."""

from dataclasses import replace
from datetime import timedelta
from itertools import combinations

import pytest
import torch
import torch.distributed as dist

from dispatch.config import MoEConfig
from dispatch.diagnosis.meter import Meter
from dispatch.exchange.factory import make_dispatcher
from dispatch.exchange.node_groups import make_node_groups
from dispatch.exchange.placement import ExpertPlacement
from runtime.commands.plan.traffic import Layout, exchange_traffic, places_per_token
from tests.ranks import run_ranks
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.model_config import ModelConfig

SEQUENCES, SEQ_LEN = 4, 64
BASE = ModelConfig(
    vocab_size=70,
    hidden=24,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    num_kv_heads=2,
    max_seq_len=SEQ_LEN,
    moe=MoEConfig(num_experts=8, top_k=8, ffn_hidden=16),
)


def measure(rank, world_size, config, exchange, payload, dtype, ranks_per_node):
    """(bytes, network bytes) of a rank in forward and in backward."""
    group, meter = dist.group.WORLD, Meter()
    nodes = make_node_groups(group, ranks_per_node, timedelta(seconds=30)) if exchange == "node" else None
    sizes = {"hidden": config.hidden, "top_k": config.moe.top_k}
    dispatcher = make_dispatcher(
        config.moe.num_experts, group, **sizes, exchange=exchange, payload=payload, nodes=nodes, meter=meter
    )
    model = Decoder(config, lambda: dispatcher)
    init_weights(model, seed=0)
    ids = torch.randint(70, (SEQUENCES, SEQ_LEN), generator=torch.Generator().manual_seed(rank))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(ids, targets=ids).total
    forward = meter.take()
    loss.backward()
    return [(reading.sent_bytes, reading.network_bytes) for reading in (forward, meter.take())]


def planned(config, exchange, payload, dtype, world_size, ranks_per_node):
    layout = Layout(ExpertPlacement(config.moe.num_experts, world_size), ranks_per_node)
    element_bytes = 2 if dtype == "bfloat16" else 4
    traffic = exchange_traffic(
        config, layout, SEQUENCES * SEQ_LEN, "auto", element_bytes=element_bytes, payload=payload
    )
    return [(links.total, links.network) for links in (traffic[exchange].forward, traffic[exchange].backward)]


def planned_as_lists(*case):
    return [pytest.approx(list(pair)) for pair in planned(*case)]


@pytest.mark.parametrize(
    ("exchange", "payload", "dtype", "recompute"),
    [
        ("rank", "compute", "float32", "none"),
        ("rank", "compute", "float32", "full"),
        ("rank", "compute", "float32", "attention"),
        ("rank", "compute", "float32", "experts"),
        ("rank", "fp8", "bfloat16", "none"),
        ("assignment", "compute", "bfloat16", "full"),
    ],
)
def test_plan_equals_the_meter_where_every_token_needs_every_expert(exchange, payload, dtype, recompute) -> None:
    config = replace(BASE, recompute=recompute)
    # The one-hop exchanges know no nodes: all that leaves a rank is network to their meter.
    expected = planned(config, exchange, payload, dtype, 2, 1)
    for measured in run_ranks(2, measure, config, exchange, payload, dtype, 1):
        assert measured == expected


def test_plan_equals_the_meter_on_two_nodes_of_two_ranks() -> None:
    # 10 experts over 4 ranks: 3 3 2 2, so that ranks are not alike and only their mean is the plan's.
    config = replace(BASE, moe=replace(BASE.moe, num_experts=10, top_k=10))
    ranks = run_ranks(4, measure, config, "node", "compute", "float32", 2)
    mean = torch.tensor(ranks, dtype=torch.float64).mean(0)
    assert mean.tolist() == planned_as_lists(config, "node", "compute", "float32", 4, 2)


def test_random_choices_come_near_the_plan() -> None:
    config = replace(BASE, moe=replace(BASE.moe, num_experts=16, top_k=2, num_groups=4, groups_kept=2))
    ranks = run_ranks(2, measure, config, "rank", "compute", "float32", 1)
    mean = sum(forward for (forward, _), _ in ranks) / 2
    assert mean == pytest.approx(planned(config, "rank", "compute", "float32", 2, 1)[0][0], rel=0.15)


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (3, 3, 2), (1,) * 8, (2, 5, 1)])
@pytest.mark.parametrize(("num_groups", "groups_kept"), [(1, 1), (4, 2), (4, 3), (2, 1)])
def test_places_per_token_equals_counting_all_choices(sizes, num_groups, groups_kept) -> None:
    config = MoEConfig(num_experts=8, top_k=3, num_groups=num_groups, groups_kept=groups_kept)
    place_of = [place for place, size in enumerate(sizes) for _ in range(size)]
    group_size = 8 // num_groups
    counts = [
        len({place_of[expert] for expert in chosen})
        for groups in combinations(range(num_groups), groups_kept if num_groups > 1 else 1)
        for chosen in combinations([e for e in range(8) if e // group_size in groups], 3)
    ]
    assert places_per_token(sizes, config) == pytest.approx(sum(counts) / len(counts))
