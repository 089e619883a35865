"""Bytes that a rank hands to others in a step: the all-to-all exchanges of its layers, and the sums of gradients.

As `dispatch.meter` counts them: rows that stay on their rank are not sent. The few integers of sizes that go before the
rows of a layer are left out, as there. Loads are taken as balanced, and a token's experts as a random choice, among the
groups that it may choose from.

Letters: K top-k, P ranks of an expert-parallel group, W expert ids of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dispatch.factory import Exchange
from dispatch.payload import TILE, Payload
from dispatch.placement import ExpertPlacement
from dispatch.router import RouterConfig
from workers.model import ModelConfig

FP32 = 4


@dataclass(frozen=True)
class Links:
    """Bytes over the network, and inside a node."""

    network: float
    node: float

    @property
    def total(self) -> float:
        """Both."""
        return self.network + self.node

    def __add__(self, other: "Links") -> "Links":
        return Links(self.network + other.network, self.node + other.node)

    def times(self, factor: float) -> "Links":
        """Scaled."""
        return Links(self.network * factor, self.node * factor)


@dataclass(frozen=True)
class Traffic:
    """Of one rank in one step. backward includes what a recompute sends once more."""

    forward: Links
    backward: Links

    @property
    def total(self) -> Links:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Layout:
    """How one expert-parallel group lies: which rank has which experts, and how many neighbours share a node."""

    placement: ExpertPlacement
    ranks_per_node: int

    @property
    def of_ranks(self) -> tuple[int, ...]:
        """Experts of each rank."""
        return self.placement.num_local_experts

    @property
    def of_nodes(self) -> list[int]:
        """Experts of each node."""
        size = self.ranks_per_node
        return [sum(self.of_ranks[start : start + size]) for start in range(0, len(self.of_ranks), size)]

    @property
    def has_nodes(self) -> bool:
        """Whether the exchange by nodes has something to do: several nodes of several ranks."""
        return 1 < self.ranks_per_node < len(self.of_ranks)


def exchange_traffic(
    config: ModelConfig, layout: Layout, num_tokens: float, *, element_bytes: int, payload: Payload
) -> dict[Exchange, Traffic]:
    """What each exchange that is possible sends for all MoE layers of a step, for a rank with so many tokens."""
    sent: dict[Exchange, Traffic] = {}
    for exchange, hops in _hops(config.moe, layout).items():
        forward = backward = Links(0.0, 0.0)
        for rows, ids_per_row, num_ids in hops:
            there = _payload_bytes(config.hidden, element_bytes, payload) + ids_per_row * (FP32 + _id_bytes(num_ids))
            answer = element_bytes * config.hidden
            # A recompute ends with the last tensor that backward needs: the experts', so that it sends no answers.
            again = there if config.recompute else 0
            forward += rows.times(there + answer)
            backward += rows.times(2 * answer + FP32 * ids_per_row + again)
        scale = config.num_moe_layers * num_tokens
        sent[exchange] = Traffic(forward.times(scale), backward.times(scale))
    return sent


def arrived_rows(config: RouterConfig, layout: Layout, exchange: Exchange) -> float:
    """Rows that reach a rank for each of its own tokens, those that stay with it among them."""
    if len(layout.of_ranks) == 1:
        return 1.0
    return config.top_k if exchange == "assignment" else places_per_token(layout.of_ranks, config)


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


def _hops(config: RouterConfig, layout: Layout) -> dict[Exchange, list[tuple[Links, int, int]]]:
    """For each exchange its hops: rows that leave for a token, expert ids of a row, and how many ids there are."""
    num_ranks, ranks_per_node = len(layout.of_ranks), layout.ranks_per_node
    # Of all ranks, this share is off the sender's node, on its node, and neither itself.
    split = Links((num_ranks - ranks_per_node) / num_ranks, (ranks_per_node - 1) / num_ranks)
    ranks, most_P = places_per_token(layout.of_ranks, config), max(layout.of_ranks)
    hops: dict[Exchange, list[tuple[Links, int, int]]] = {
        "assignment": [(split.times(config.top_k), 1, most_P)],
        "rank": [(split.times(ranks), config.top_k, most_P)],
    }
    if layout.has_nodes:
        nodes = places_per_token(layout.of_nodes, config)
        num_nodes = len(layout.of_nodes)
        over_network = Links(nodes * (num_nodes - 1) / num_nodes, 0.0)
        in_node = Links(0.0, ranks * (ranks_per_node - 1) / ranks_per_node)
        hops["node"] = [
            (over_network, config.top_k, max(layout.of_nodes)),
            (in_node, config.top_k, most_P),
        ]
    return hops


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


def _payload_bytes(hidden: int, element_bytes: int, payload: Payload) -> int:
    return hidden + FP32 * -(-hidden // TILE) if payload == "fp8" else element_bytes * hidden


def _id_bytes(num_ids: int) -> int:
    # dispatch.hop: one id more says that an assignment is another rank's.
    return 1 if num_ids < 256 else 4
