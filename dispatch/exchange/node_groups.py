"""The process groups of the ranks inside a node, and of the ranks with one local rank in all nodes.

Shapes: G ranks of a node.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from dispatch.errors import InvalidValue
from dispatch.values import all_gather_values, list_of


@dataclass(frozen=True)
class NodeGroups:
    """The two process groups through which an EP rank exchanges rows with `node`.

    local_group: the ranks of its node. network_group: the ranks of all nodes that have its local rank. EP ranks are
    numbered node by node: rank r has local rank r % G in node r // G.
    """

    network_group: dist.ProcessGroup
    local_group: dist.ProcessGroup


def make_node_groups(ep_group: dist.ProcessGroup, ranks_per_node: int, timeout: timedelta | None = None) -> NodeGroups:
    """Form the process groups that the exchange `node` needs: across nodes, and inside each node.

    Collective over the default group: every rank of the job must call it, whichever EP group it is in. Neighbouring
    ranks of an EP group are taken to be on one node.

    Args:
        ep_group: the EP group of this rank.
        ranks_per_node: ranks of an EP group on one node.
        timeout: of collectives in the new groups; None for torch's default.
    Raises:
        InvalidValue: ranks_per_node does not divide the size of the EP group. It is also a ValueError.
    """
    ranks = dist.get_process_group_ranks(ep_group)
    if ranks_per_node < 1 or len(ranks) % ranks_per_node:
        raise InvalidValue(
            f"ranks_per_node ({ranks_per_node}) must divide ep_size ({len(ranks)}); use one of "
            f"{[size for size in range(1, len(ranks) + 1) if len(ranks) % size == 0]}"
        )
    all_ranks = all_gather_values(ranks, dist.group.WORLD, list_of(int))
    found: dict[str, dist.ProcessGroup] = {}
    # Every rank forms every group, also those of others, in the same order: torch names a group by the number of groups
    # formed before, and ranks find each other by that name.
    for members in sorted(set(map(tuple, all_ranks))):
        for start in range(0, len(members), ranks_per_node):
            _form("local", members[start : start + ranks_per_node], timeout, found)
        for local_rank in range(ranks_per_node):
            _form("network", members[local_rank::ranks_per_node], timeout, found)
    return NodeGroups(found["network"], found["local"])


def _form(kind: str, members: tuple[int, ...], timeout: timedelta | None, found: dict[str, dist.ProcessGroup]) -> None:
    """Form one group, with all ranks of the job; keep it in `found[kind]` where this rank is a member."""
    group = dist.new_group(list(members), timeout=timeout)
    if dist.get_rank() in members and group is not None:
        found[kind] = group
