"""Chooses the exchange for `parallel.exchange auto`, from which ranks share a node; checks one that is set.

The driver and every rank come to the same choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from dispatch.errors import InvalidValue
from dispatch.exchange.factory import WireCost, cheapest_exchange, wire_costs
from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.registry import BACKENDS
from workers.distributed.parallel import ParallelConfig


@dataclass(frozen=True)
class ExchangeChoice:
    """The exchange, named as in `parallel.exchange`; the ranks per node of its node groups (0: none); and why."""

    exchange: str
    ranks_per_node: int
    reason: str


def choose_exchange(
    config: ParallelConfig, nodes: Sequence[int], world_size: int, *, num_experts: int, hidden: int, top_k: int
) -> ExchangeChoice:
    """The exchange for these ranks: as set, or for `auto` the one that is expected to take the least time.

    Args:
        nodes: the index of each rank's machine, by rank; empty where it is not known.
    Raises:
        InvalidValue: the setting asks for an exchange by nodes, but the ranks are placed so that it cannot work.
    """
    BACKENDS.check(config.exchange, config.module)  # imports the module in a worker, which got the settings by pickle
    ep_size = config.resolve(world_size)
    if ep_size == 1:
        return ExchangeChoice(config.exchange, 0, "nothing travels: every rank holds all experts")
    ranks_per_node = config.ranks_per_node or placed_ranks_per_node(nodes, ep_size)
    layout = _describe(nodes, ep_size) + (f"; ranks_per_node {ranks_per_node} as set" if config.ranks_per_node else "")
    needs_nodes = config.backend is not None and config.backend.needs_nodes
    if needs_nodes and not ranks_per_node:
        raise InvalidValue(
            f"parallel.exchange {config.exchange} needs expert-parallel groups over several nodes with equally many "
            f"ranks on each, more than one, but here is {layout}; take --parallel.exchange auto, place the workers "
            "otherwise, or say how many neighbouring ranks count as a node by --parallel.ranks_per_node"
        )
    placement = ExpertPlacement(num_experts, ep_size)
    exchange = config.exchange
    if exchange == "auto":
        exchange = cheapest_exchange(placement, ranks_per_node or 1, hidden=hidden, top_k=top_k)
    else:
        layout = f"as set; {layout}"
    config.check_takes_copies(exchange)
    costs = wire_costs(placement, ranks_per_node or 1, hidden=hidden, top_k=top_k)
    used_per_node = ranks_per_node if BACKENDS[exchange].needs_nodes else 0
    return ExchangeChoice(exchange, used_per_node, layout + _expectation(costs))


def _expectation(costs: Mapping[str, WireCost]) -> str:
    """The expected bytes and time of `node`, compared with the better of `rank` and `assignment`.

    Empty where no bytes cross the network.
    """
    other = "rank" if costs["rank"].total <= costs["assignment"].total else "assignment"
    if "node" not in costs or not costs[other].network:
        return ""
    network = costs["node"].network / costs[other].network
    time = costs["node"].total / costs[other].total
    return f"; node is expected to put {network:.2f} of the bytes of {other} on the network, in {time:.2f} of its time"


def placed_ranks_per_node(nodes: Sequence[int], ep_size: int) -> int:
    """How many neighbouring ranks share a node, where that is the same number above one on all nodes; else 0.

    Also 0 where no expert-parallel group crosses nodes, and for an empty `nodes`.
    """
    lengths = {length for group in _runs(nodes, ep_size) for length in group}
    if len(lengths) != 1 or lengths in ({1}, {ep_size}):
        return 0
    return lengths.pop()


def _runs(nodes: Sequence[int], ep_size: int) -> list[tuple[int, ...]]:
    """For each expert-parallel group, the number of neighbouring ranks on each node in turn."""
    groups = (nodes[start : start + ep_size] for start in range(0, len(nodes), ep_size))
    return [tuple(len(list(run)) for _, run in groupby(group)) for group in groups]


def _describe(nodes: Sequence[int], ep_size: int) -> str:
    if not nodes:
        return "nodes not known"
    kinds = sorted(set(_runs(nodes, ep_size)))
    return " and ".join(map(_describe_group, kinds)) + (" a group" if ep_size < len(nodes) else "")


def _describe_group(lengths: tuple[int, ...]) -> str:
    if len(lengths) == 1:
        return "1 node"
    if len(set(lengths)) == 1:
        return f"{len(lengths)} nodes x {lengths[0]} rank{'s' * (lengths[0] > 1)}"
    return f"nodes with {', '.join(map(str, lengths))} ranks"
