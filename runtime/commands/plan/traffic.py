"""Bytes that a rank hands to others in a step: the all-to-all exchanges of its layers, and the sums of gradients.

As `dispatch.diagnosis.meter` counts them: rows that stay on their rank are not sent. The few integers of sizes that go
before the rows of a layer are left out, as there. Loads are taken as balanced, and a token's experts as a random
choice, among the groups that it may choose from.

Letters: K top-k, P ranks of an expert-parallel group, W expert ids of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dispatch.config import RouterConfig
from dispatch.exchange.payload import Payload, coded_row_bytes
from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.registry import BACKENDS, Spread
from workers.model.model_config import ModelConfig

FP32 = 4


@dataclass(frozen=True)
class Links:
    """Bytes over the network, and inside a node."""

    network: float
    node: float

    @property
    def total(self) -> float:
        """Bytes over both kinds of link."""
        return self.network + self.node

    def __add__(self, other: "Links") -> "Links":
        return Links(self.network + other.network, self.node + other.node)

    def times(self, factor: float) -> "Links":
        """The bytes of `factor` times as much."""
        return Links(self.network * factor, self.node * factor)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one step. backward includes the dispatch of a recompute."""

    forward: Links
    backward: Links

    @property
    def total(self) -> Links:
        """Bytes of forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Layout:
    """Where an expert-parallel group lies: which rank has which experts, and how many ranks in a row share a node."""

    placement: ExpertPlacement
    ranks_per_node: int

    @property
    def experts_per_rank(self) -> tuple[int, ...]:
        """Experts of each rank."""
        return self.placement.num_local_experts

    @property
    def experts_per_node(self) -> list[int]:
        """Experts of each node."""
        size, experts = self.ranks_per_node, self.experts_per_rank
        return [sum(experts[start : start + size]) for start in range(0, len(experts), size)]


def exchange_traffic(
    config: ModelConfig, layout: Layout, num_tokens: float, chosen: str, *, element_bytes: int, payload: Payload
) -> dict[str, Traffic]:
    """Bytes that a rank with `num_tokens` sends in all MoE layers of a step, by exchange.

    Exchanges: those that `auto` can choose from, where they are possible, and `chosen`.
    """
    sent: dict[str, Traffic] = {}
    spread = spread_of(config.moe, layout)
    for exchange in (name for name, backend in BACKENDS.items() if backend.automatic or name == chosen):
        hops = BACKENDS[exchange].hops(spread)
        if not hops:
            continue
        forward = backward = Links(0.0, 0.0)
        for hop in hops:
            rows = Links(hop.network, hop.node).times(hop.rows)
            id_bytes = hop.ids_per_row * (FP32 + _id_bytes(hop.num_ids))
            dispatch_bytes = coded_row_bytes(config.hidden, element_bytes, payload) + id_bytes
            combine_bytes = element_bytes * config.hidden
            # A recompute ends with the last tensor that backward needs, which is of the experts: it combines nothing.
            recompute_bytes = dispatch_bytes if config.recompute in ("experts", "full") else 0
            forward += rows.times(dispatch_bytes + combine_bytes)
            backward += rows.times(2 * combine_bytes + FP32 * hop.ids_per_row + recompute_bytes)
        scale = config.num_moe_layers * num_tokens
        sent[exchange] = Traffic(forward.times(scale), backward.times(scale))
    return sent


def spread_of(config: RouterConfig, layout: Layout) -> Spread:
    """The number of ranks and of nodes over which the experts of a token are spread."""
    return Spread(
        experts_P=layout.experts_per_rank,
        experts_N=tuple(layout.experts_per_node),
        ranks_per_node=layout.ranks_per_node,
        top_k=config.top_k,
        ranks_per_token=places_per_token(layout.experts_per_rank, config),
        nodes_per_token=places_per_token(layout.experts_per_node, config),
    )


def places_per_token(experts_of_places: Sequence[int], config: RouterConfig) -> float:
    """How many of these places, which hold neighbouring experts, a token needs on average.

    Group-limited routing leaves it `groups_kept` groups, taken as random ones, and random experts of theirs.
    """
    group_size = config.num_experts // config.num_groups
    start, needed = 0, 0.0
    for size in experts_of_places:
        needed += _chance_of(range(start, start + size), group_size, config)
        start += size
    return needed


def gradient_bytes(num_elements: int, num_ranks: int) -> float:
    """What a ring sends from each rank to sum fp32 gradients over the ranks."""
    return 2 * FP32 * num_elements * (num_ranks - 1) / num_ranks


def _chance_of(experts: range, group_size: int, config: RouterConfig) -> float:
    """The chance that a token chooses one of these neighbouring experts."""
    groups = range(experts.start // group_size, -(-experts.stop // group_size))
    # Ways to keep `kept` of the groups that hold them, with `held` of them among the kept ones.
    ways = {(0, 0): 1}
    for group in groups:
        inside = min(experts.stop, (group + 1) * group_size) - max(experts.start, group * group_size)
        more: dict[tuple[int, int], int] = dict(ways)
        for (kept, held), number in ways.items():
            key = (kept + 1, held + inside)
            more[key] = more.get(key, 0) + number
        ways = more
    kept_groups = config.groups_kept if config.num_groups > 1 else 1
    others, candidates = config.num_groups - len(groups), kept_groups * group_size
    chance = 0.0
    for (kept, held), number in ways.items():
        if kept <= kept_groups:
            share = number * math.comb(others, kept_groups - kept) / math.comb(config.num_groups, kept_groups)
            missed = math.comb(candidates - held, config.top_k) / math.comb(candidates, config.top_k)
            chance += share * (1 - missed)
    return chance


def _id_bytes(num_ids: int) -> int:
    # dispatch.exchange.exchange_group: one id more says that an assignment is another rank's.
    return 1 if num_ids < 256 else 4
