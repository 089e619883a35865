"""The exchange follows from where the ranks lie; the reason says what was seen and what it is expected to cost."""

from dataclasses import replace

import pytest
import torch.distributed as dist

from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.node_aware import NodeAwareDispatcher
from dispatch.layer import MoELayer
from tests.ranks import run_ranks
from tests.workers.training_gang import make_spec
from workers.distributed.exchange_choice import choose_exchange, placed_ranks_per_node
from workers.distributed.parallel import ParallelConfig
from workers.worker import Worker

WIDE = {"num_experts": 64, "hidden": 10**6, "top_k": 8}


@pytest.mark.parametrize(
    ("nodes", "ep_size", "ranks_per_node"),
    [
        ((0, 0, 1, 1), 4, 2),
        ((0, 0, 0, 1, 1, 1, 2, 2, 2), 9, 3),
        ((0, 0, 1, 1, 2, 2, 3, 3), 4, 2),  # two groups over two nodes each
        ((0, 0, 0, 0), 4, 0),  # one node
        ((0, 0, 1, 1), 2, 0),  # each group on one node
        ((0, 1, 2, 3), 4, 0),  # one rank a node: nothing to fan out to
        ((0, 0, 0, 1), 4, 0),  # uneven
        ((0, 0, 0, 0, 1, 1, 2, 2), 4, 0),  # one group on a node, the other over two
        ((0, 1, 1, 0), 4, 0),  # not neighbours
        ((), 4, 0),
    ],
)
def test_ranks_of_a_node_are_counted_only_where_every_group_lies_alike(nodes, ep_size, ranks_per_node):
    assert placed_ranks_per_node(nodes, ep_size) == ranks_per_node


@pytest.mark.parametrize(
    ("nodes", "exchange", "ranks_per_node", "reason"),
    [
        ((0,) * 8, "rank", 0, "1 node"),
        ((0, 1, 2, 3), "rank", 0, "4 nodes x 1 rank"),
        ((0, 0, 0, 1), "rank", 0, "nodes with 3, 1 ranks"),
        ((), "rank", 0, "nodes not known"),
        # 8 of 64 experts on 8 ranks of 8: rank reaches 8 * (1 - C(56,8)/C(64,8)) = 5.433 ranks of which 4/8 lie off
        # the node; node reaches 2 * (1 - C(32,8)/C(64,8)) = 1.995 nodes of which 1/2: 0.998 / 2.717 of the bytes.
        (
            (0, 0, 0, 0, 1, 1, 1, 1),
            "node",
            4,
            "2 nodes x 4 ranks; node is expected to put 0.37 of the bytes of rank on the network, in 0.68 of its time",
        ),
    ],
)
def test_auto_follows_the_placement_and_says_why(nodes, exchange, ranks_per_node, reason):
    choice = choose_exchange(ParallelConfig(), nodes, len(nodes) or 4, **WIDE)
    assert (choice.exchange, choice.ranks_per_node, choice.reason) == (exchange, ranks_per_node, reason)


def test_nodes_that_would_cost_more_are_not_taken_unless_asked_for_and_then_it_is_said():
    nodes, one_expert = (0, 0, 1, 1), WIDE | {"top_k": 1}  # each token goes to one rank: a second hop saves nothing
    auto = choose_exchange(ParallelConfig(), nodes, 4, **one_expert)
    assert (auto.exchange, auto.ranks_per_node) == ("rank", 0)
    asked = choose_exchange(ParallelConfig(exchange="node"), nodes, 4, **one_expert)
    assert (asked.exchange, asked.ranks_per_node) == ("node", 2)
    assert asked.reason.startswith("as set; 2 nodes x 2 ranks; node is expected to put 1.00 of the bytes of rank")
    # over the network 1/2 row at 3.2, then 1/2 row inside: 2.1; directly 1/2 at 3.2 and 1/4 inside: 1.85
    assert asked.reason.endswith("in 1.14 of its time")


def test_nodes_by_hand_go_before_the_placement():
    choice = choose_exchange(ParallelConfig(exchange="node", ranks_per_node=2), (0,) * 4, 4, **WIDE)
    assert (choice.exchange, choice.ranks_per_node) == ("node", 2)
    assert choice.reason.startswith("as set; 1 node; ranks_per_node 2 as set; node is expected to put 0.5")


def test_one_rank_with_all_experts_sends_nothing():
    assert choose_exchange(ParallelConfig(ep_size=1), (0, 1), 2, **WIDE).reason.startswith("nothing travels")


def test_nodes_where_the_placement_has_none_are_refused_with_the_placement():
    with pytest.raises(ValueError, match=r"more than one, but here is nodes with 3, 1 ranks; take .*exchange auto"):
        choose_exchange(ParallelConfig(exchange="node"), (0, 0, 0, 1), 4, **WIDE)


def _built(rank, world_size, spec, nodes):
    dist.barrier()
    dist.destroy_process_group()
    worker = Worker(spec)
    store = dist.FileStore(str(spec.run_dir.parent / "store"), world_size)
    worker.join(rank=rank, world_size=world_size, store=store, timeout_s=20.0, nodes=nodes)
    return {type(layer.dispatcher).__name__ for layer in worker._state.model.modules() if isinstance(layer, MoELayer)}


@pytest.mark.parametrize(("nodes", "built"), [((0, 0, 1, 1), NodeAwareDispatcher), ((0,) * 4, AllToAllDispatcher)])
def test_ranks_build_what_was_chosen(tmp_path, nodes, built):
    spec = make_spec(tmp_path)
    spec = replace(spec, model=replace(spec.model, moe=replace(spec.model.moe, top_k=4)))
    assert run_ranks(4, _built, spec, nodes) == [{built.__name__}] * 4
