"""The protocol of dispatchers: how each token's row reaches its experts and how the results come back.

Shapes: T tokens of a chunk on this rank (may be 0, may differ by rank), K top-k, H hidden, E experts, L experts of this
rank, P EP ranks, Q rows that arrive, R rows of the local experts (a copy each; both may be 0).
"""

import functools
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.row_map import RowMap

StateT = TypeVar("StateT")


@dataclass(frozen=True)
class DispatchHandle(Generic[StateT]):
    """All that the experts, `combine` and backward need of one dispatch.

    tokens_per_local_expert_L: the number of rows of each local expert; they sum to R.
    sources_R: int64; the arrived row that each expert row is a copy of. Expert rows are in order of local expert.
    row_weights_R: the combine weight of each expert row, part of the autograd graph; the experts apply it.
    num_arrived: Q.
    combine_state: private to the dispatcher. Its `combine` needs it, and refuses the state of another kind.
    """

    tokens_per_local_expert_L: list[int]
    sources_R: Tensor
    row_weights_R: Tensor
    num_arrived: int
    combine_state: StateT

    @functools.cached_property
    def expert_rows(self) -> RowMap:
        """Which arrived row each expert row is a copy of, for experts that want one tensor of all their rows."""
        return RowMap.from_sources(self.sources_R, self.num_arrived)


@dataclass(frozen=True)
class ChunkPlan:
    """Where the tokens of one chunk go, with the sizes known on the host.

    splits: for each group that the rows pass, the rows to and from each of its ranks. tokens_per_local_expert_L: rows
    that each local expert will get from all ranks; empty where an exchange learns them only while rows leave, but the
    handle of a finished dispatch always has them. layer: the name of the MoE layer, for errors and hangs.
    """

    topk_ids_TK: Tensor
    tokens_per_local_expert_L: list[int]
    splits: tuple[tuple[list[int], list[int]], ...] = ()
    layer: str = ""


@dataclass(frozen=True)
class PendingDispatch(Generic[StateT]):
    """A dispatch that has started and is not awaited yet. state: private to the dispatcher."""

    plan: ChunkPlan
    state: StateT


@dataclass(frozen=True)
class PendingCombine(Generic[StateT]):
    """A combine that has started and is not awaited yet. state: private to the dispatcher."""

    state: StateT


class Dispatcher(Protocol):
    """Sends tokens to their experts and back. Each way has a start and a finish, to compute while rows travel.

    A layer calls `plan`, then for each chunk `start_dispatch`, `finish_dispatch`, the experts, `start_combine` and
    `finish_combine`. `dispatch` and `combine` do the same at once. Each call is collective over the EP group, in
    backward too: every rank makes the same calls in the same order, also without tokens. Several chunks may be in
    flight. Shapes: T tokens of a chunk on this rank, K experts of a token, H hidden, Q rows that arrive here.
    """

    placement: ExpertPlacement
    ep_rank: int
    top_k: int | None = None
    """Set by `make_dispatcher`: the experts of a token that the exchange was chosen for; None if it fits any number."""
    exchange: str = "none"
    """Set by `make_dispatcher`: the name of the exchange; "none" where nothing is sent."""
    meter: Meter
    buffer_pool: BufferPool

    def plan(self, topk_ids_TK: Tensor, num_chunks: int = 1) -> list[ChunkPlan]:
        """Cut the batch into `num_chunks` chunks and exchange the number of rows that each rank will send.

        Args:
            topk_ids_TK: int64 (T, K) in [0, num_experts), K different experts for each token.
            num_chunks: at least 1; with fewer tokens than chunks some are empty.

        The host waits for the device once, whatever the number of chunks: backends take split sizes as host integers.
        """
        ...

    def max_sizes(self, plans: list[ChunkPlan]) -> tuple[int, int, int]:
        """Return maxima over ranks: expert rows of all chunks together, expert rows of a chunk, tokens of a chunk.

        It costs a reduction and waits for the device; only `ScheduleConfig.max_rows` needs it. This base method returns
        the sizes of this rank alone, which dispatchers of several ranks reduce.
        """
        rows = [sum(plan.tokens_per_local_expert_L) for plan in plans]
        return sum(rows), max(rows), max(len(plan.topk_ids_TK) for plan in plans)

    def start_dispatch(self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan) -> PendingDispatch[Any]:
        """Start to send a chunk's rows to their experts.

        Args:
            x_TH: floating point (T, H).
            topk_weights_TK: combine weights, floating point (T, K); they need not sum to 1.
            plan: the chunk, from `plan`.
        Raises:
            ValueError: the shapes of x, weights and planned ids do not fit together.
        """
        ...

    def finish_dispatch(self, pending: PendingDispatch[Any]) -> tuple[Tensor, DispatchHandle[Any]]:
        """Wait for the rows: (Q, H), and a handle that says which local experts need which of them."""
        ...

    def start_combine(self, sums_QH: Tensor, handle: DispatchHandle[Any]) -> PendingCombine[Any]:
        """Start to send back the sum of the local experts' outputs for each arrived row: (Q, H).

        Raises:
            ValueError: another kind of dispatcher made the handle.
        """
        ...

    def finish_combine(self, pending: PendingCombine[Any]) -> Tensor:
        """Wait for the results, and sum them for each token: (T, H)."""
        ...

    def dispatch(
        self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> tuple[Tensor, DispatchHandle[Any]]:
        """Plan, send and wait, for the whole batch as one chunk."""
        check_shapes(x_TH, topk_ids_TK, topk_weights_TK)
        (plan,) = self.plan(topk_ids_TK)
        return self.finish_dispatch(self.start_dispatch(x_TH, topk_weights_TK, plan))

    def combine(self, sums_QH: Tensor, handle: DispatchHandle[Any]) -> Tensor:
        """Send back and wait: (T, H)."""
        return self.finish_combine(self.start_combine(sums_QH, handle))


def state_of_kind(handle: DispatchHandle[StateT], kind: type) -> StateT:
    """The handle's combine_state. Raises ValueError if it is of another kind: another kind of dispatcher made it."""
    if not isinstance(handle.combine_state, kind):
        raise ValueError("another kind of dispatcher made this handle; combine with the dispatcher that made it")
    return handle.combine_state


def check_shapes(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
    """Raise ValueError unless the three fit together."""
    if topk_ids_TK.shape != topk_weights_TK.shape or x_TH.dim() != 2 or len(x_TH) != len(topk_ids_TK):
        raise ValueError(
            f"x {tuple(x_TH.shape)}, topk_ids {tuple(topk_ids_TK.shape)} and topk_weights "
            f"{tuple(topk_weights_TK.shape)} must be (T, hidden), (T, top_k) and (T, top_k)"
        )
