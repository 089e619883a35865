"""The exchange that knows which ranks share a node: once over the network for each node, then on inside it.

Shapes: K top-k, C chunks, P EP ranks, N nodes, G ranks of a node, E experts, L local experts.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.all_to_all import AllToAllDispatcher
from dispatch.errors import InvalidValue
from dispatch.hop import Hop
from dispatch.values import all_gather_values, list_of


@dataclass(frozen=True)
class NodeGroups:
    """The two groups of an EP rank: those of its node, and those at its place in the other nodes.

    EP ranks are numbered node by node: rank r is the (r % G)-th of node r // G.
    """

    network_group: dist.ProcessGroup
    local_group: dist.ProcessGroup


def make_node_groups(ep_group: dist.ProcessGroup, ranks_per_node: int, timeout: timedelta | None = None) -> NodeGroups:
    """Form the groups of every EP group of the job. timeout: of their collectives; None for torch's default.

    Raises:
        ValueError: ranks_per_node does not divide the size of the EP group.

    Collective over the default group, whichever EP group a rank is in.
    """
    ranks = dist.get_process_group_ranks(ep_group)
    if ranks_per_node < 1 or len(ranks) % ranks_per_node:
        raise InvalidValue(
            f"ranks_per_node ({ranks_per_node}) must divide ep_size ({len(ranks)}); use one of "
            f"{[size for size in range(1, len(ranks) + 1) if len(ranks) % size == 0]}"
        )
    all_ranks = all_gather_values(ranks, dist.group.WORLD, list_of(int))
    found: dict[str, dist.ProcessGroup] = {}
    # Every rank forms every group, in the same order: torch numbers groups by how many were formed before.
    for members in sorted(set(map(tuple, all_ranks))):
        for start in range(0, len(members), ranks_per_node):
            _form("local", members[start : start + ranks_per_node], timeout, found)
        for place in range(ranks_per_node):
            _form("network", members[place::ranks_per_node], timeout, found)
    return NodeGroups(found["network"], found["local"])


def _form(kind: str, members: tuple[int, ...], timeout: timedelta | None, found: dict[str, dist.ProcessGroup]) -> None:
    group = dist.new_group(list(members), timeout=timeout)
    if dist.get_rank() in members and group is not None:
        found[kind] = group


@dataclass(kw_only=True)
class NodeAwareDispatcher(AllToAllDispatcher):
    """One row for each (token, node) over the network, then one for each (token, rank) inside the node.

    It goes to the rank of that node at the sender's place, which passes it on and adds up what its neighbours return.
    With routing limited to M nodes (`RouterConfig.num_groups` the nodes, `groups_kept` M) a token crosses the network
    at most M times (arXiv 2412.19437, section 2.1.2). Any number of nodes and of ranks per node.
    """

    nodes: NodeGroups

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ranks = Hop(self.placement.num_local_experts, self.ep_group, self.meter, self.recycler)

    def _make_hops(self) -> tuple[Hop, ...]:
        size = dist.get_world_size(self.nodes.local_group)
        experts_P = self.placement.num_local_experts
        experts_N = tuple(sum(experts_P[start : start + size]) for start in range(0, len(experts_P), size))
        first = dist.get_rank(self.nodes.network_group) * size
        return (
            Hop(experts_N, self.nodes.network_group, self.meter, self.recycler, link="network"),
            Hop(experts_P[first : first + size], self.nodes.local_group, self.meter, self.recycler, link="node"),
        )

    def _flows(self, chunks: list[Tensor]) -> list[Tensor]:
        """As `AllToAllDispatcher._flows`, for both hops.

        A sender knows the rank that a token needs in the end, so its first message says what the second hop will carry:
        the sizes of both are known before any row leaves, and on the host after one synchronisation.
        """
        network, local = self.hops
        rows_CP, counts_CE = self.ranks.count(chunks)
        rows_CN, _ = network.count(chunks)
        num_nodes, num_local = len(network.num_experts_P), len(local.num_experts_P)
        came_NCX, places_N = network.swap_sizes(
            torch.cat([rows_CN.unsqueeze(2), rows_CP.view(-1, num_nodes, num_local)], 2), counts_CE
        )
        rows_CG, counts_CX = came_NCX[..., 1 : 1 + num_local].sum(0), came_NCX[..., 1 + num_local :].sum(0)
        came_GCX, places_G = local.swap_sizes(rows_CG.unsqueeze(2), counts_CX)
        return [
            rows_CN,
            came_NCX[..., 0].t(),
            rows_CG,
            came_GCX[..., 0].t(),
            came_GCX[..., 1:].sum(0),
            torch.cat([places_N, places_G]),
        ]
