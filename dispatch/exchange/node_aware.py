"""The exchange that knows which ranks share a node: a row crosses the network once for each node.

This file makes the two groups of ranks and computes how many rows each exchange carries. `AllToAllDispatcher` moves the
rows through one group of `self.groups` after the other: over the network, then inside the node (`token_exchange` calls
the collective).

Shapes: K top-k, C chunks, P EP ranks, N nodes, G ranks of a node, E experts, L local experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.exchange.exchange_group import ExchangeGroup
from dispatch.exchange.node_groups import NodeGroups
from dispatch.exchange.registry import BackendContext, Hop, Spread, register_backend


@dataclass(kw_only=True)
class NodeAwareDispatcher(AllToAllDispatcher):
    """Sends one row for each (token, node) over the network, then one for each (token, rank) inside the node.

    A row goes first to the rank of the other node with the sender's local rank, which passes it on to the ranks of its
    node and sums what they return.
    With routing limited to M nodes (`RouterConfig.num_groups` the nodes, `groups_kept` M) a token crosses the network
    at most M times (arXiv 2412.19437, section 2.1.2). Any number of nodes and of ranks per node.
    """

    nodes: NodeGroups

    def __post_init__(self) -> None:
        super().__post_init__()
        # Only counts which ranks the tokens need; it sends nothing.
        self.all_ranks = ExchangeGroup(self.num_physical_P, self.ep_group, self.meter, self.buffer_pool)

    def _make_groups(self) -> tuple[ExchangeGroup, ...]:
        size = dist.get_world_size(self.nodes.local_group)
        experts_P = self.num_physical_P
        experts_N = tuple(sum(experts_P[start : start + size]) for start in range(0, len(experts_P), size))
        first = dist.get_rank(self.nodes.network_group) * size
        return (
            ExchangeGroup(experts_N, self.nodes.network_group, self.meter, self.buffer_pool, link="network"),
            ExchangeGroup(
                experts_P[first : first + size], self.nodes.local_group, self.meter, self.buffer_pool, link="node"
            ),
        )

    def _exchange_sizes(self, chunks: Sequence[Tensor]) -> list[Tensor]:
        """As `AllToAllDispatcher._exchange_sizes`, for both groups.

        A sender knows the final ranks of its tokens, so its message over the network also says how many rows the
        exchange inside the node will carry. So the sizes of both are known before any row leaves, and reach the host in
        one copy.
        """
        network, local = self.groups
        rows_CP, counts_CE = self.all_ranks.count(chunks)
        rows_CN, _ = network.count(chunks)
        num_nodes, num_local = len(network.num_experts_P), len(local.num_experts_P)
        received_NCX, places_N = network.exchange_sizes(
            torch.cat([rows_CN.unsqueeze(2), rows_CP.view(-1, num_nodes, num_local)], 2), counts_CE
        )
        rows_CG, counts_CX = received_NCX[..., 1 : 1 + num_local].sum(0), received_NCX[..., 1 + num_local :].sum(0)
        received_GCX, places_G = local.exchange_sizes(rows_CG.unsqueeze(2), counts_CX)
        return [
            rows_CN,
            received_NCX[..., 0].t(),
            rows_CG,
            received_GCX[..., 0].t(),
            received_GCX[..., 1:].sum(0),
            torch.cat([places_N, places_G]),
        ]


def _over_nodes(spread: Spread) -> list[Hop]:
    """A row for each node, then one for each rank of it; nothing without several nodes of several ranks."""
    ranks_per_node, num_nodes = spread.ranks_per_node, len(spread.experts_N)
    if not 1 < ranks_per_node < len(spread.experts_P):
        return []
    across, inside = (num_nodes - 1) / num_nodes, (ranks_per_node - 1) / ranks_per_node
    top_k, ids_N, ids_P = spread.top_k, max(spread.experts_N), max(spread.experts_P)
    return [
        Hop(rows=spread.nodes_per_token, network=across, node=0.0, ids_per_row=top_k, num_ids=ids_N),
        Hop(rows=spread.ranks_per_token, network=0.0, node=inside, ids_per_row=top_k, num_ids=ids_P),
    ]


@register_backend("node", hops=_over_nodes, needs_nodes=True, takes_copies=True)
def _node(context: BackendContext) -> Dispatcher:
    return NodeAwareDispatcher(
        context.shape.num_experts,
        context.ep_group,
        payload=context.shape.payload,
        meter=context.meter,
        buffer_pool=context.buffer_pool,
        nodes=context.nodes,  # type: ignore[arg-type] # a backend with needs_nodes is built with nodes
    )
