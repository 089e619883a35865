"""The exchange by nodes: what it puts on which kind of link, counted independently from the routing; its groups."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from dispatch.config import RouterConfig
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.factory import cheapest_exchange, make_dispatcher
from dispatch.exchange.node_aware import NodeAwareDispatcher
from dispatch.exchange.node_groups import make_node_groups
from dispatch.exchange.placement import ExpertPlacement
from dispatch.routing.router import Router
from tests.ranks import run_ranks

NUM_EXPERTS, TOP_K, HIDDEN = 12, 3, 20
ROW, WEIGHT, EXPERT_ID = 4 * HIDDEN, 4, 1  # bytes: fp32 rows and weights, ids of a byte


@dataclass(frozen=True)
class Links:
    """Rows that a rank sends and receives over the network and inside its node, on the way to the experts."""

    network_out: int = 0
    network_in: int = 0
    node_out: int = 0
    node_in: int = 0

    @property
    def network_bytes(self):
        return _bytes(self.network_out, self.network_in)

    @property
    def sent_bytes(self):
        return self.network_bytes + _bytes(self.node_out, self.node_in)


def _bytes(rows_out, rows_in):
    """Out: rows, their weights and ids, and later the gradients of what came back. In: answers; gradients of both."""
    return rows_out * (ROW + TOP_K * (WEIGHT + EXPERT_ID) + ROW) + rows_in * (ROW + ROW + TOP_K * WEIGHT)


def _expected(me, ids_of_ranks, ranks_per_node):
    """The links of rank `me`, token by token: from the sender to its place in each node, from there to each rank."""
    owner = [rank for rank in range(len(ids_of_ranks)) for _ in range(NUM_EXPERTS // len(ids_of_ranks))]
    counts = dict.fromkeys(Links.__dataclass_fields__, 0)
    for sender, ids in enumerate(ids_of_ranks):
        for token in ids.tolist():
            ranks = {owner[expert] for expert in token}
            for node in {rank // ranks_per_node for rank in ranks}:
                entry = node * ranks_per_node + sender % ranks_per_node
                counts["network_out"] += sender == me != entry
                counts["network_in"] += entry == me != sender
                for rank in ranks:
                    if rank // ranks_per_node == node and rank != entry:
                        counts["node_out"] += entry == me
                        counts["node_in"] += rank == me
    return Links(**counts)


def _ids(rank):
    """Distinct random experts; the second rank has no token."""
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(0 if rank == 1 else 20 + rank, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K]


def _there_and_back(dispatcher, ids):
    """One exchange with backward, its experts only weighing: y, gradients, reading."""
    generator = torch.Generator().manual_seed(dispatcher.ep_rank)
    x = torch.randn(len(ids), HIDDEN, generator=generator, requires_grad=True)
    weights = torch.rand(len(ids), TOP_K, generator=generator).requires_grad_()
    arrived, handle = dispatcher.dispatch(x, ids, weights)
    rows = handle.expert_rows.copy(arrived) * handle.row_weights_R.unsqueeze(1)
    y = dispatcher.combine(handle.expert_rows.sum(rows), handle)
    (y * torch.randn(len(ids), HIDDEN, generator=generator)).sum().backward()
    return [y.detach(), x.grad, weights.grad], dispatcher.meter.take()


def _readings_on_ranks(rank, world_size, ranks_per_node):
    group = dist.group.WORLD
    nodes = make_node_groups(group, ranks_per_node)
    values, reading = _there_and_back(NodeAwareDispatcher(NUM_EXPERTS, group, nodes=nodes), _ids(rank))
    plain, _ = _there_and_back(AllToAllDispatcher(NUM_EXPERTS, group), _ids(rank))
    for one, other in zip(values, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    return reading


@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), [(2, 2), (4, 1), (1, 4), (3, 2)])
def test_a_row_crosses_the_network_once_for_each_node_and_the_node_once_for_each_rank(num_nodes, ranks_per_node):
    world_size = num_nodes * ranks_per_node
    ids_of_ranks = [_ids(rank) for rank in range(world_size)]
    for rank, reading in enumerate(run_ranks(world_size, _readings_on_ranks, ranks_per_node)):
        links = _expected(rank, ids_of_ranks, ranks_per_node)
        assert (reading.network_bytes, reading.sent_bytes) == (links.network_bytes, links.sent_bytes)
        assert (reading.network_bytes > 0) is (num_nodes > 1)
        assert (reading.sent_bytes > reading.network_bytes) is (ranks_per_node > 1)


def _limited_on_ranks(rank, world_size, groups_kept):
    """Network bytes on the way to the experts, and how many other nodes each token needs; 4 nodes of one rank."""
    torch.manual_seed(0)
    router = Router(HIDDEN, RouterConfig(num_experts=12, top_k=3, num_groups=4, groups_kept=groups_kept))
    ids, weights = router(torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(rank)))
    dispatcher = NodeAwareDispatcher(12, dist.group.WORLD, nodes=make_node_groups(dist.group.WORLD, 1))
    dispatcher.dispatch(torch.randn(60, HIDDEN), ids, weights)
    crossings = [len({expert // 3 for expert in token} - {rank}) for token in ids.tolist()]
    return dispatcher.meter.take().network_bytes, crossings


def test_a_token_limited_to_some_nodes_crosses_the_network_at_most_as_often():
    row = ROW + TOP_K * (WEIGHT + EXPERT_ID)
    for groups_kept in (1, 2):
        for network_bytes, crossings in run_ranks(4, _limited_on_ranks, groups_kept):
            assert max(crossings) == groups_kept
            assert network_bytes == sum(crossings) * row <= groups_kept * 60 * row
    # Without the limit a token of three experts can need three other nodes.
    assert max(max(crossings) for _, crossings in run_ranks(4, _limited_on_ranks, 4)) == 3


def _groups_side_by_side(rank, world_size, ranks_per_node):
    """Two EP groups of two ranks, {0, 1} and {2, 3}: the groups of this rank's nodes, and an exchange in them."""
    ep_group = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    nodes = make_node_groups(ep_group, ranks_per_node)
    ids = _ids(rank)
    by_nodes, reading = _there_and_back(NodeAwareDispatcher(NUM_EXPERTS, ep_group, nodes=nodes), ids)
    plain, _ = _there_and_back(AllToAllDispatcher(NUM_EXPERTS, ep_group), ids)
    assert all(map(torch.equal, by_nodes, plain))
    ranks = [dist.get_process_group_ranks(group) for group in (nodes.network_group, nodes.local_group)]
    return *ranks, reading.sent_bytes == reading.network_bytes > 0, reading.network_bytes > 0


def test_ep_groups_side_by_side_have_nodes_of_their_own():
    # One rank a node: the other node is a network away. Two: both share it, and nothing crosses the network.
    assert run_ranks(4, _groups_side_by_side, 1) == [
        ([0, 1], [0], True, True), ([0, 1], [1], True, True), ([2, 3], [2], True, True), ([2, 3], [3], True, True)
    ]  # fmt: skip
    assert run_ranks(4, _groups_side_by_side, 2) == [
        ([0], [0, 1], False, False), ([1], [0, 1], False, False),
        ([2], [2, 3], False, False), ([3], [2, 3], False, False),
    ]  # fmt: skip


def _refused_on_ranks(rank, world_size):
    messages = []
    for ranks_per_node in (3, 0, 8):
        with pytest.raises(ValueError) as caught:
            make_node_groups(dist.group.WORLD, ranks_per_node)
        messages.append(str(caught.value))
    with pytest.raises(ValueError) as caught:
        make_dispatcher(8, dist.group.WORLD, hidden=8, top_k=2, exchange="node")
    return [*messages, str(caught.value)]


def test_nodes_that_do_not_divide_the_group_are_refused():
    *messages, without = run_ranks(4, _refused_on_ranks)[0]
    for ranks_per_node, message in zip((3, 0, 8), messages, strict=True):
        assert f"ranks_per_node ({ranks_per_node}) must divide ep_size (4); use one of [1, 2, 4]" in message
    assert "exchange 'node' needs the groups of its nodes; pass nodes=make_node_groups(...)" in without


def _alone(rank, world_size):
    return type(make_dispatcher(8, dist.group.WORLD, hidden=8, top_k=2, exchange="node")).__name__


def test_one_rank_needs_no_nodes():
    assert run_ranks(1, _alone) == ["LocalDispatcher"]


# Per token and in rows of equal width, a row that stays in its node costing 1 and one that leaves it 3.2:
@pytest.mark.parametrize(
    ("ep_size", "ranks_per_node", "top_k", "chosen"),
    [
        # 8 ranks, all chosen. rank: 8 rows, 4/8 of them away and 3/8 near: 8 x (1.6 + 0.375) = 15.8.
        # node: 2 rows, half of them away, then 8 rows, 3/4 of them near: 3.2 + 6 = 9.2.
        (8, 4, 16, "node"),
        # One expert: one rank in one node. rank: 1.6 + 0.375 = 1.975; node: 1.6 + 0.75 = 2.35.
        (8, 4, 1, "rank"),
        # All ranks in one node: nothing is away, and both cost 8 x 7/8.
        (8, 8, 16, "rank"),
        # Every rank a node of its own, or nodes not known.
        (8, 1, 16, "rank"),
    ],
)
def test_the_cheapest_exchange_of_hand_worked_cases(ep_size, ranks_per_node, top_k, chosen):
    # So wide that weights and ids do not count.
    assert cheapest_exchange(ExpertPlacement(16, ep_size), ranks_per_node, hidden=10**6, top_k=top_k) == chosen


def test_a_row_for_each_expert_is_cheapest_where_weights_outweigh_rows():
    # One number a row: 8 experts on 64 ranks are 7.6 ranks, whose rows would carry all 8 weights each.
    assert cheapest_exchange(ExpertPlacement(64, 64), 1, hidden=1, top_k=8) == "assignment"


def _chosen_on_ranks(rank, world_size):
    nodes = make_node_groups(dist.group.WORLD, 2)
    # All four ranks: 4 rows, half of them away and a quarter near, 7.4; by nodes 3.2, and 4 rows, half of them near.
    made = [make_dispatcher(4, dist.group.WORLD, hidden=512, top_k=4, nodes=given) for given in (nodes, None)]
    return [type(dispatcher) for dispatcher in made]


def test_auto_considers_nodes_where_they_are_known():
    assert run_ranks(4, _chosen_on_ranks)[0] == [NodeAwareDispatcher, AllToAllDispatcher]
