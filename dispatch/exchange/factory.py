"""Builds the dispatcher of an EP group; `auto` chooses the exchange that would send the fewest bytes."""

import math
from dataclasses import dataclass

import torch.distributed as dist

from dispatch.diagnosis.meter import Meter
from dispatch.errors import InvalidValue
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.exchange.node_groups import NodeGroups
from dispatch.exchange.payload import Payload
from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.registry import BACKENDS, BackendContext, ExchangeShape, Hop, Spread

# Bandwidth inside a node over that between nodes: NVLink 160 GB/s, InfiniBand 50 GB/s (arXiv 2412.19437, 3.2.2).
NODE_OVER_NETWORK = 3.2


def make_dispatcher(
    num_experts: int,
    ep_group: dist.ProcessGroup,
    *,
    hidden: int,
    top_k: int,
    exchange: str = "auto",
    payload: Payload = "compute",
    nodes: NodeGroups | None = None,
    meter: Meter | None = None,
    buffer_pool: BufferPool | None = None,
) -> Dispatcher:
    """Build the dispatcher of an MoE layer: it knows which rank has which experts, and sends the rows.

    Every rank of the group must call it with the same values. With one rank nothing is sent, whatever `exchange` is.

    Args:
        num_experts: routed experts of the layer over all ranks. Rank r gets a contiguous block of them; it need not be
            a multiple of the number of ranks.
        ep_group: the ranks that share the experts of the layer.
        hidden: width of a token's vector; used by `auto` to compare costs, and by `deep_ep`.
        top_k: experts of a token; used likewise.
        exchange: what is sent for a token. `assignment`: a row for each expert. `rank`: a row for each rank, which
            copies it to its experts. `node`: a row for each node over the network, then one for each rank inside it.
            `auto`: whichever sends fewest bytes if a token's experts are a random choice. `deep_ep`: as `rank`, by
            DeepEP's kernels; never chosen by `auto`. Or one of your own, by `register_backend`.
        payload: `compute` sends rows in their dtype, `fp8` as e4m3 with a scale for each 128 elements (only to the
            experts; sums and gradients are never quantised).
        nodes: from `make_node_groups`; needed by `node`, and by `auto` to consider it.
        meter: measures phases and bytes; None for one of its own.
        buffer_pool: CPU buffers to use again; None for one of its own.
    Raises:
        InvalidValue: `top_k` is not in 1 to `num_experts`; `node` without `nodes`; `deep_ep` with `fp8`, or where
            DeepEP cannot run. It is also a ValueError.
    """
    BACKENDS.check(exchange, None)
    if not 1 <= top_k <= num_experts:
        raise InvalidValue(f"top_k ({top_k}) must be between 1 and num_experts ({num_experts}); lower top_k")
    backend = BACKENDS.get(exchange)
    meter, buffer_pool, ep_size = meter or Meter(), buffer_pool or BufferPool(), dist.get_world_size(ep_group)
    dispatcher: Dispatcher
    if ep_size == 1:
        dispatcher = LocalDispatcher(num_experts, meter, buffer_pool)
    else:
        if backend is None:
            ranks_per_node = dist.get_world_size(nodes.local_group) if nodes else 1
            placement = ExpertPlacement(num_experts, ep_size)
            exchange = cheapest_exchange(placement, ranks_per_node, hidden=hidden, top_k=top_k)
            backend = BACKENDS[exchange]
        if backend.needs_nodes and nodes is None:
            raise InvalidValue(f"exchange {exchange!r} needs the groups of its nodes; pass nodes=make_node_groups(...)")
        shape = ExchangeShape(num_experts=num_experts, ep_size=ep_size, hidden=hidden, top_k=top_k, payload=payload)
        backend.check(shape)
        dispatcher = backend.build(
            BackendContext(shape=shape, ep_group=ep_group, nodes=nodes, meter=meter, buffer_pool=buffer_pool)
        )
        dispatcher.exchange = exchange
    dispatcher.top_k = top_k
    return dispatcher


@dataclass(frozen=True)
class WireCost:
    """How many numbers a rank is expected to send for one token, over the network and inside its node.

    Elements of rows, combine weights, their gradients and ids all count as one, whatever their bytes.
    """

    network: float
    node: float

    @property
    def total(self) -> float:
        """A number sent over the network counts as NODE_OVER_NETWORK numbers sent inside the node: it takes as long."""
        return self.network * NODE_OVER_NETWORK + self.node


def cheapest_exchange(placement: ExpertPlacement, ranks_per_node: int, *, hidden: int, top_k: int) -> str:
    """The exchange that `auto` stands for: the one with the least `WireCost.total`."""
    costs = wire_costs(placement, ranks_per_node, hidden=hidden, top_k=top_k)
    return min(costs, key=lambda name: costs[name].total)


def wire_costs(placement: ExpertPlacement, ranks_per_node: int, *, hidden: int, top_k: int) -> dict[str, WireCost]:
    """What each exchange that `auto` may choose would send if a token's experts were a random choice.

    A row carries `hidden` numbers there and back, and for each of its assignments a combine weight, its gradient and an
    id. Ranks of a node are neighbours; with one rank a node all rows cross the network.
    """
    experts_P = placement.num_local_experts
    starts = range(0, len(experts_P), ranks_per_node)
    experts_N = tuple(sum(experts_P[start : start + ranks_per_node]) for start in starts)
    spread = Spread(
        experts_P=experts_P,
        experts_N=experts_N,
        ranks_per_node=ranks_per_node,
        top_k=top_k,
        ranks_per_token=places_needed(experts_P, top_k),
        nodes_per_token=places_needed(experts_N, top_k),
    )
    sent = {name: backend.hops(spread) for name, backend in BACKENDS.items() if backend.automatic}
    return {name: _cost(hops, hidden) for name, hops in sent.items() if hops}


def _cost(hops: list[Hop], hidden: int) -> WireCost:
    sent = [(hop, hop.rows * (2 * hidden + 3 * hop.ids_per_row)) for hop in hops]
    return WireCost(sum(hop.network * size for hop, size in sent), sum(hop.node * size for hop, size in sent))


def places_needed(sizes: tuple[int, ...], top_k: int) -> float:
    """How many of these groups of experts `top_k` random experts fall into, on average.

    A group of `size` experts is missed with probability C(total - size, top_k) / C(total, top_k).
    """
    total = sum(sizes)
    return sum(1 - math.comb(total - size, top_k) / math.comb(total, top_k) for size in sizes)
