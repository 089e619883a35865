"""The exchanges by name: how each is built, where it can work, and what it sends. Imports no torch, for `--help`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dispatch.registry import Registry

if TYPE_CHECKING:
    import torch.distributed as dist

    from dispatch.diagnosis.meter import Meter
    from dispatch.exchange.buffer_pool import BufferPool
    from dispatch.exchange.dispatcher import Dispatcher
    from dispatch.exchange.node_groups import NodeGroups
    from dispatch.exchange.payload import Payload


@dataclass(frozen=True, kw_only=True)
class ExchangeShape:
    """What an exchange has to carry, known before a process starts; `ep_size` is at least 2.

    device: "cpu", "cuda" or "auto". dtype: as in run.dtype. Both are None where they are not known yet. runs_here:
    whether the ranks run on this machine, so that a check may look for devices and packages.
    """

    num_experts: int
    ep_size: int
    hidden: int
    top_k: int
    payload: "Payload" = "compute"
    device: str | None = None
    dtype: str | None = None
    runs_here: bool = True


@dataclass(frozen=True, kw_only=True)
class BackendContext:
    """What a dispatcher is built from. nodes: not None for a backend registered with `needs_nodes`."""

    shape: ExchangeShape
    ep_group: "dist.ProcessGroup"
    nodes: "NodeGroups | None"
    meter: "Meter"
    buffer_pool: "BufferPool"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Over how many ranks and nodes the experts of a token are spread, on average. Neighbouring ranks share a node.

    experts_P, experts_N: the number of experts of each rank and of each node. ranks_per_token, nodes_per_token: on how
    many ranks and nodes a token has experts, on average.
    """

    experts_P: tuple[int, ...]
    experts_N: tuple[int, ...]
    ranks_per_node: int
    top_k: int
    ranks_per_token: float
    nodes_per_token: float


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One all-to-all of an exchange, as it is on average for one token of the sender.

    rows: its rows, also those that stay on their rank. network, node: the shares of these rows that leave the sender's
    node, and that go to another rank of the node. ids_per_row: expert ids, each with its weight, that a row carries.
    num_ids: the number of different ids, which decides their width.
    """

    rows: float
    network: float
    node: float
    ids_per_row: int
    num_ids: int


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An exchange as registered, see `register_backend`."""

    build: Callable[[BackendContext], "Dispatcher"]
    hops: Callable[[Spread], list[Hop]]
    check: Callable[[ExchangeShape], None]
    automatic: bool
    needs_nodes: bool
    replayable: bool
    takes_copies: bool


# Trimtab's own exchanges, each with the module that registers it.
BACKENDS: Registry[Backend] = Registry(
    "parallel.exchange",
    {
        "rank": "dispatch.exchange.all_to_all",
        "assignment": "dispatch.exchange.all_to_all",
        "node": "dispatch.exchange.node_aware",
        "deep_ep": "dispatch.exchange.deep_ep",
    },
    other_choices=("auto",),
)

Build = TypeVar("Build", bound=Callable[[BackendContext], "Dispatcher"])


def works_everywhere(shape: ExchangeShape) -> None:
    """The check of an exchange that takes every device, dtype, payload and size."""


def register_backend(
    name: str,
    *,
    hops: Callable[[Spread], list[Hop]],
    check: Callable[[ExchangeShape], None] = works_everywhere,
    automatic: bool = True,
    needs_nodes: bool = False,
    replayable: bool = True,
    takes_copies: bool = False,
) -> Callable[[Build], Build]:
    """Register the decorated function, which builds a `Dispatcher`, as an exchange that `parallel.exchange` can name.

    Args:
        name: the value of `parallel.exchange`.
        hops: the all-to-alls that a row goes through, in order; empty where the exchange makes no sense, as one by
            nodes on one node. `auto` and `trimtab plan` compute the bytes sent from them.
        check: raises InvalidValue, with a way out, for a shape that the exchange cannot carry. It is called before a
            process starts, and again when the dispatcher is built.
        automatic: whether `auto` may choose it.
        needs_nodes: whether it needs the groups of `make_node_groups`.
        replayable: whether plain calls of torch's all-to-all can repeat its messages, as `trimtab bench dispatch` does.
        takes_copies: whether it builds an `AllToAllDispatcher`, which can send an expert's rows to copies of it.
    """

    def register(build: Build) -> Build:
        backend = Backend(
            build=build,
            hops=hops,
            check=check,
            automatic=automatic,
            needs_nodes=needs_nodes,
            replayable=replayable,
            takes_copies=takes_copies,
        )
        BACKENDS.register(name, backend, build)
        return build

    return register


def one_row_a_rank(spread: Spread) -> list[Hop]:
    """A row for each rank that a token needs, with the ids of its experts."""
    return [_between_ranks(spread, spread.ranks_per_token, spread.top_k)]


def one_row_an_assignment(spread: Spread) -> list[Hop]:
    """A row for each expert of a token."""
    return [_between_ranks(spread, spread.top_k, 1)]


def _between_ranks(spread: Spread, rows: float, ids_per_row: int) -> Hop:
    num_ranks = len(spread.experts_P)
    return Hop(
        rows=rows,
        network=(num_ranks - spread.ranks_per_node) / num_ranks,
        node=(spread.ranks_per_node - 1) / num_ranks,
        ids_per_row=ids_per_row,
        num_ids=max(spread.experts_P),
    )
