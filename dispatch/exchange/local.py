"""The dispatcher of one rank that holds all experts.

Shapes: as in `dispatch.exchange.dispatcher`; Q = T, since every row has arrived where it is.
"""

from dataclasses import dataclass, field

import torch
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
    chunks_of,
)
from dispatch.exchange.placement import ExpertPlacement
from dispatch.routing.selection import count_by_expert

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
        chunks = chunks_of(topk_ids_TK, num_chunks)
        with self.meter.span("dispatch", topk_ids_TK.device):
            counts = [count_by_expert(chunk_TK, self.num_experts).tolist() for chunk_TK in chunks]
        return [ChunkPlan(chunk_TK, count) for chunk_TK, count in zip(chunks, counts, strict=True)]

    def start_dispatch(self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan) -> PendingDispatch[_Arrived]:
        """See `Dispatcher.start_dispatch`."""
        check_shapes(x_TH, plan.topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            order_R = _order_by_expert(plan.topk_ids_TK.flatten(), self.num_experts)
            handle = DispatchHandle(
                tokens_per_local_expert_L=plan.tokens_per_local_expert_L,
                sources_R=order_R // plan.topk_ids_TK.shape[1],
                row_weights_R=topk_weights_TK.flatten().gather(0, order_R),
                num_arrived=len(x_TH),
                combine_state=None,
            )
        self.meter.count(routed=len(order_R), sent=len(order_R), received=len(order_R))
        return PendingDispatch(plan, (x_TH, handle))

    def finish_dispatch(self, pending: PendingDispatch[_Arrived]) -> _Arrived:
        """See `Dispatcher.finish_dispatch`."""
        return pending.state

    def start_combine(self, sums_QH: Tensor, handle: DispatchHandle[None]) -> PendingCombine[Tensor]:
        """See `Dispatcher.start_combine`."""
        self.meter.count(returned=len(handle.row_weights_R))
        return PendingCombine(sums_QH)

    def finish_combine(self, pending: PendingCombine[Tensor]) -> Tensor:
        """See `Dispatcher.finish_combine`."""
        return pending.state


def _order_by_expert(expert_ids_A: Tensor, num_experts: int) -> Tensor:
    """The stable order of assignments by expert, int64 (A,)."""
    # A narrow integer sorts by radix on CPU, three times faster than int64.
    return expert_ids_A.to(torch.uint8 if num_experts <= 256 else torch.int16).argsort(stable=True)
