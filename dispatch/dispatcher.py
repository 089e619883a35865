"""Dispatchers: how each token's row reaches its experts and how the results come back.

Shapes: T tokens of a chunk on this rank (may be 0, may differ by rank), K top-k, H hidden, E experts, L experts of this
rank, P EP ranks, Q rows that arrive, R rows of the local experts (a copy each; both may be 0).
"""

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dispatch.meter import Meter
from dispatch.placement import ExpertPlacement
from dispatch.recycler import Recycler
from dispatch.row_map import RowMap
from dispatch.selection import count_by_expert


@dataclass(frozen=True)
class DispatchHandle:
    """All that the experts, `combine` and backward need of one dispatch.

    tokens_per_local_expert_L: rows of each local expert; sums to R.
    sources_R: the arrived row that each expert row is a copy of, int64, expert rows in order of local expert.
    row_weights_R: the combine weight of each expert row, with its gradient; the experts apply it.
    num_arrived: Q.
    way_back: what the dispatcher needs to bring the results home; its own affair.
    """

    tokens_per_local_expert_L: list[int]
    sources_R: Tensor
    row_weights_R: Tensor
    num_arrived: int
    way_back: Any = None

    @functools.cached_property
    def expert_rows(self) -> RowMap:
        """The copies themselves, for experts that want a tensor of all rows."""
        return RowMap.of(self.sources_R, self.num_arrived)


@dataclass(frozen=True)
class ChunkPlan:
    """Where the tokens of one chunk go, sizes known on the host.

    tokens: the chunk's place in the batch of this rank. splits: for each hop, rows to and from each of its ranks.
    tokens_per_local_expert_L: rows that each local expert will get from all ranks; empty where an exchange learns them
    only as rows leave. The handle of a finished dispatch always has them. layer: the MoE layer, for who waits.
    """

    tokens: slice
    topk_ids_TK: Tensor
    tokens_per_local_expert_L: list[int]
    splits: tuple[tuple[list[int], list[int]], ...] = ()
    layer: str = ""


@dataclass(frozen=True)
class UnderWay:
    """A dispatch or combine that was started and is not awaited yet. rows, trips: the dispatcher's own affair."""

    plan: ChunkPlan
    rows: Any
    trips: Any = None


class Dispatcher(Protocol):
    """One way of exchange, in halves, so that a layer can compute while rows travel.

    `plan`, then for each chunk `start_dispatch`, `finish_dispatch`, the experts, `start_combine`, `finish_combine`.
    Implementations hold no state of a step: any number of chunks may be in flight. Each call is collective over the EP
    group, in backward too, and every rank makes the same calls in the same order, also without a token.
    """

    placement: ExpertPlacement
    ep_rank: int
    top_k: int | None = None
    """Experts of a token that the exchange was chosen for; None fits any number."""
    meter: Meter
    recycler: Recycler

    def plan(self, topk_ids_TK: Tensor, num_chunks: int = 1) -> list[ChunkPlan]:
        """Cut the batch into `num_chunks` runs of tokens and tell the ranks how many rows each will bring.

        topk_ids_TK: int64 in [0, num_experts), K different experts a token. Waits for the device once, whatever the
        number of chunks, and nothing else of the layer does: the backend takes split sizes as host integers. (DeepEP
        waits elsewhere: `dispatch.deep_ep`.)
        """
        ...

    def busiest(self, plans: list[ChunkPlan]) -> tuple[int, int]:
        """Most expert rows and most tokens that one of the chunks has on any rank; the same on all ranks.

        Collective, and waits for the device: only layers with a bound on their rows ask.
        """
        ...

    def start_dispatch(self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan) -> UnderWay:
        """Let the chunk's rows leave for their experts. topk_weights_TK: float; they need not sum to 1.

        Raises:
            ValueError: the shapes of x, weights and the planned ids do not fit.
        """
        ...

    def finish_dispatch(self, under_way: UnderWay) -> tuple[Tensor, DispatchHandle]:
        """Wait. arrived_QH, each row as often as it travelled, and by the handle the experts find theirs among them."""
        ...

    def start_combine(self, sums_QH: Tensor, handle: DispatchHandle) -> UnderWay:
        """Let what the experts made of each arrived row leave for home."""
        ...

    def finish_combine(self, under_way: UnderWay) -> Tensor:
        """Wait, and sum per token: y_TH."""
        ...

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        """Plan, start and wait, for the whole batch at once."""
        check_shapes(x_TH, topk_ids_TK, topk_weights_TK)
        (plan,) = self.plan(topk_ids_TK)
        return self.finish_dispatch(self.start_dispatch(x_TH, topk_weights_TK, plan))

    def combine(self, sums_QH: Tensor, handle: DispatchHandle) -> Tensor:
        """The way back, start and wait: y_TH."""
        return self.finish_combine(self.start_combine(sums_QH, handle))


@dataclass
class LocalDispatcher(Dispatcher):
    """All experts on this rank: nothing travels and nothing is copied."""

    num_experts: int
    meter: Meter = field(default_factory=Meter)
    recycler: Recycler = field(default_factory=Recycler)

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement(self.num_experts, ep_size=1)
        self.ep_rank = 0

    def plan(self, topk_ids_TK: Tensor, num_chunks: int = 1) -> list[ChunkPlan]:
        """See `Dispatcher.plan`; not collective."""
        pieces = chunk_slices(len(topk_ids_TK), num_chunks)
        with self.meter.span("dispatch", topk_ids_TK.device):
            counts = [count_by_expert(topk_ids_TK[piece], self.num_experts).tolist() for piece in pieces]
        return [ChunkPlan(piece, topk_ids_TK[piece], count) for piece, count in zip(pieces, counts, strict=True)]

    def busiest(self, plans: list[ChunkPlan]) -> tuple[int, int]:
        """See `Dispatcher.busiest`; not collective."""
        return busiest_here(plans)

    def start_dispatch(self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan) -> UnderWay:
        """See `Dispatcher.start_dispatch`."""
        check_shapes(x_TH, plan.topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            order_R = order_by_expert(plan.topk_ids_TK.flatten(), self.num_experts)
            handle = DispatchHandle(
                tokens_per_local_expert_L=plan.tokens_per_local_expert_L,
                sources_R=order_R // plan.topk_ids_TK.shape[1],
                row_weights_R=topk_weights_TK.flatten().gather(0, order_R),
                num_arrived=len(x_TH),
            )
        self.meter.count(routed=len(order_R), sent=len(order_R), received=len(order_R))
        return UnderWay(plan, (x_TH, handle))

    def finish_dispatch(self, under_way: UnderWay) -> tuple[Tensor, DispatchHandle]:
        """See `Dispatcher.finish_dispatch`."""
        arrived: tuple[Tensor, DispatchHandle] = under_way.rows
        return arrived

    def start_combine(self, sums_QH: Tensor, handle: DispatchHandle) -> UnderWay:
        """See `Dispatcher.start_combine`."""
        self.meter.count(returned=len(handle.row_weights_R))
        return UnderWay(handle.way_back, sums_QH)

    def finish_combine(self, under_way: UnderWay) -> Tensor:
        """See `Dispatcher.finish_combine`."""
        y_TH: Tensor = under_way.rows
        return y_TH


def busiest_here(plans: list[ChunkPlan]) -> tuple[int, int]:
    """Most expert rows and most tokens that one of the chunks has on this rank."""
    rows = max(sum(plan.tokens_per_local_expert_L) for plan in plans)
    return rows, max(len(plan.topk_ids_TK) for plan in plans)


def chunk_slices(num_tokens: int, num_chunks: int) -> list[slice]:
    """`num_chunks` neighbouring runs of nearly equal length; some are empty where there are fewer tokens."""
    ends = [num_tokens * chunk // num_chunks for chunk in range(num_chunks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def order_by_expert(expert_ids_A: Tensor, num_experts: int) -> Tensor:
    """The stable order of assignments by expert, int64 (A,)."""
    # A narrow integer sorts by radix on CPU, three times faster than int64.
    return expert_ids_A.to(torch.uint8 if num_experts <= 256 else torch.int16).argsort(stable=True)


def check_shapes(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
    """Raise ValueError unless the three fit together."""
    if topk_ids_TK.shape != topk_weights_TK.shape or x_TH.dim() != 2 or len(x_TH) != len(topk_ids_TK):
        raise ValueError(
            f"x {tuple(x_TH.shape)}, topk_ids {tuple(topk_ids_TK.shape)} and topk_weights "
            f"{tuple(topk_weights_TK.shape)} must be (T, hidden), (T, top_k) and (T, top_k)"
        )
