"""Every exchange between ranks by name, as kind(num_experts, group): what all of them must be able to do."""

import math

import torch.distributed as dist

from dispatch.all_to_all import AllToAllDispatcher
from dispatch.node_aware import NodeAwareDispatcher, make_node_groups


def _assignment(num_experts, group):
    return AllToAllDispatcher(num_experts, group, per_assignment=True)


def _nodes(num_experts, group, ranks_per_node):
    return NodeAwareDispatcher(num_experts, group, nodes=make_node_groups(group, ranks_per_node))


def _one_rank_a_node(num_experts, group):
    return _nodes(num_experts, group, 1)


def _two_ranks_a_node(num_experts, group):
    """One node of all ranks where they are odd."""
    size = dist.get_world_size(group)
    return _nodes(num_experts, group, 2 if math.gcd(size, 2) == 2 else size)


KINDS = {
    "rank": AllToAllDispatcher,
    "assignment": _assignment,
    "one rank a node": _one_rank_a_node,
    "two ranks a node": _two_ranks_a_node,
}
