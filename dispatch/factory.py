"""The dispatcher for an EP group, chosen by the bytes that each exchange would put on the wire."""

import math
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from dispatch.all_to_all import AllToAllDispatcher
from dispatch.deep_ep import DeepEPDispatcher
from dispatch.dispatcher import Dispatcher, LocalDispatcher
from dispatch.errors import InvalidValue
from dispatch.meter import Meter
from dispatch.node_aware import NodeAwareDispatcher, NodeGroups
from dispatch.payload import Payload
from dispatch.placement import ExpertPlacement
from dispatch.recycler import Recycler

Exchange = Literal["auto", "assignment", "rank", "node", "deep_ep"]

# Bandwidth inside a node over that between nodes: NVLink 160 GB/s, InfiniBand 50 GB/s (arXiv 2412.19437, 3.2.2).
NODE_OVER_NETWORK = 3.2


def make_dispatcher(
    num_experts: int,
    ep_group: dist.ProcessGroup,
    *,
    hidden: int,
    top_k: int,
    exchange: Exchange = "auto",
    payload: Payload = "compute",
    nodes: NodeGroups | None = None,
    meter: Meter | None = None,
    recycler: Recycler | None = None,
) -> Dispatcher:
    """Build what `exchange` names; with one rank nothing travels, whatever it names.

    Args:
        exchange: a row for each (token, expert), (token, rank), or (token, node) and then rank; `auto` takes the one
            that costs the wire least when a token's experts are a random choice. `deep_ep` leaves a row for each
            (token, rank) to DeepEP's kernels, and is never chosen by `auto`.
        payload: `fp8` codes the rows on their way to the experts.
        nodes: needed by `node`, and by `auto` to consider it.
    Raises:
        ValueError: `node` without nodes; `deep_ep` with a payload, or where it cannot work (`dispatch.deep_ep`).
    """
    dispatcher = _make(
        num_experts, ep_group, hidden, top_k, exchange, payload, nodes, meter or Meter(), recycler or Recycler()
    )
    dispatcher.top_k = top_k
    return dispatcher


def _make(
    num_experts: int,
    ep_group: dist.ProcessGroup,
    hidden: int,
    top_k: int,
    exchange: Exchange,
    payload: Payload,
    nodes: NodeGroups | None,
    meter: Meter,
    recycler: Recycler,
) -> Dispatcher:
    ep_size = dist.get_world_size(ep_group)
    if exchange == "node" and nodes is None:
        raise InvalidValue("exchange 'node' needs the groups of its nodes; pass nodes=make_node_groups(...)")
    if exchange == "deep_ep" and payload != "compute":
        raise InvalidValue(f"payload {payload!r} is not for exchange 'deep_ep', which sends bf16 rows; take 'compute'")
    if ep_size == 1:
        return LocalDispatcher(num_experts, meter, recycler)
    if exchange == "auto":
        ranks_per_node = dist.get_world_size(nodes.local_group) if nodes else 1
        exchange = cheapest_exchange(ExpertPlacement(num_experts, ep_size), ranks_per_node, hidden=hidden, top_k=top_k)
    if exchange == "deep_ep":
        return DeepEPDispatcher(num_experts, ep_group, hidden, top_k, meter=meter, recycler=recycler)
    common = {"payload": payload, "meter": meter, "recycler": recycler}
    if exchange == "node":
        return NodeAwareDispatcher(num_experts, ep_group, nodes=nodes, **common)  # type: ignore[arg-type]
    return AllToAllDispatcher(num_experts, ep_group, exchange == "assignment", **common)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WireCost:
    """Words that a rank is expected to send for one of its tokens: over the network, and inside its node."""

    network: float
    node: float

    @property
    def total(self) -> float:
        """In words inside a node: one over the network takes as long as NODE_OVER_NETWORK of them."""
        return self.network * NODE_OVER_NETWORK + self.node


def cheapest_exchange(placement: ExpertPlacement, ranks_per_node: int, *, hidden: int, top_k: int) -> Exchange:
    """The exchange whose rows cost the wire least, those inside a node being cheaper."""
    costs = wire_costs(placement, ranks_per_node, hidden=hidden, top_k=top_k)
    return min(costs, key=lambda name: costs[name].total)


def wire_costs(placement: ExpertPlacement, ranks_per_node: int, *, hidden: int, top_k: int) -> dict[Exchange, WireCost]:
    """What each exchange costs the wire when a token's experts are a random choice; `node` where a node has several.

    A row carries its hidden words, and for each of its assignments a combine weight, a gradient of it and an id. Ranks
    of a node are neighbours; with one rank a node all rows cross the network.
    """
    experts_P = placement.num_local_experts
    experts_N = [sum(experts_P[start : start + ranks_per_node]) for start in range(0, len(experts_P), ranks_per_node)]
    wide, narrow = 2 * hidden + 3 * top_k, 2 * hidden + 3
    # Of all ranks, this share is off the sender's node, on its node, and neither itself.
    num_ranks, num_nodes = len(experts_P), len(experts_N)
    off = (num_ranks - ranks_per_node) / num_ranks
    near = (ranks_per_node - 1) / num_ranks
    ranks, nodes = _needed(experts_P, top_k), _needed(experts_N, top_k)
    costs: dict[Exchange, WireCost] = {
        "rank": WireCost(ranks * wide * off, ranks * wide * near),
        "assignment": WireCost(top_k * narrow * off, top_k * narrow * near),
    }
    if ranks_per_node > 1:
        costs["node"] = WireCost(
            nodes * wide * (num_nodes - 1) / num_nodes, ranks * wide * (ranks_per_node - 1) / ranks_per_node
        )
    return costs


def ranks_per_token(num_experts: int, ep_size: int, top_k: int) -> float:
    """Ranks that a token needs on average when its experts are a random choice, as under a balanced load nearly."""
    return _needed(ExpertPlacement(num_experts, ep_size).num_local_experts, top_k)


def _needed(sizes: tuple[int, ...] | list[int], top_k: int) -> float:
    """How many of these groups of experts `top_k` random experts fall into, on average."""
    total = sum(sizes)
    return sum(1 - math.comb(total - size, top_k) / math.comb(total, top_k) for size in sizes)
