"""The dispatcher of one rank that holds all experts.

Shapes: as in `dispatch.exchange.dispatcher`; Q = T, since the rows of the tokens are the arrived rows.
"""

from dataclasses import dataclass, field

from torch import Tensor

from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.dispatcher import (
    ChunkPlan,
    Dispatcher,
    DispatchHandle,
    PendingCombine,
    PendingDispatch,
    check_shapes,
    state_of_kind,
)
from dispatch.exchange.exchange_group import id_dtype, order_by_expert
from dispatch.exchange.placement import ExpertPlacement
from dispatch.routing.selection import count_by_expert
from dispatch.values import host_lists

_Arrived = tuple[Tensor, DispatchHandle[None]]


@dataclass
class LocalDispatcher(Dispatcher):
    """All experts on this rank: nothing travels and nothing is copied."""

    num_experts: int
    meter: Meter = field(default_factory=Meter)
    buffer_pool: BufferPool = field(default_factory=BufferPool)

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement(self.num_experts, ep_size=1)
        self.ep_rank = 0

    def plan(self, topk_ids_TK: Tensor, num_chunks: int = 1) -> list[ChunkPlan]:
        """See `Dispatcher.plan`; not collective."""
        chunks = topk_ids_TK.tensor_split(num_chunks)
        with self.meter.span("dispatch", topk_ids_TK.device):
            counts = host_lists(*(count_by_expert(chunk_TK, self.num_experts) for chunk_TK in chunks))
        return [ChunkPlan(chunk_TK, counts_E) for chunk_TK, counts_E in zip(chunks, counts, strict=True)]

    def start_dispatch(self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan) -> PendingDispatch[_Arrived]:
        """See `Dispatcher.start_dispatch`."""
        check_shapes(x_TH, plan.topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            ids_TK, num_rows = plan.topk_ids_TK.to(id_dtype(self.num_experts - 1)), plan.topk_ids_TK.numel()
            sources_R, row_weights_R = order_by_expert(ids_TK, topk_weights_TK, num_rows)
        handle = DispatchHandle(plan.tokens_per_local_expert_L, sources_R, row_weights_R, len(x_TH), None)
        self.meter.count(routed=num_rows, sent=num_rows, received=num_rows)
        return PendingDispatch(plan, (x_TH, handle))

    def finish_dispatch(self, pending: PendingDispatch[_Arrived]) -> _Arrived:
        """See `Dispatcher.finish_dispatch`."""
        return pending.state

    def start_combine(self, sums_QH: Tensor, handle: DispatchHandle[None]) -> PendingCombine[Tensor]:
        """See `Dispatcher.start_combine`."""
        state_of_kind(handle, type(None))
        self.meter.count(returned=len(handle.row_weights_R))
        return PendingCombine(sums_QH)

    def finish_combine(self, pending: PendingCombine[Tensor]) -> Tensor:
        """See `Dispatcher.finish_combine`."""
        return pending.state
