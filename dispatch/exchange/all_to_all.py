"""The exchanges between EP ranks by all-to-all, on any backend of torch.distributed (NCCL and gloo, the same code).

`AllToAllDispatcher` makes one exchange over the EP group, with a row for each (token, rank) or for each (token,
expert); `dispatch.exchange.node_aware` makes two, one after the other.

Shapes: T tokens of a chunk on this rank (may be 0), K top-k, H hidden, C chunks, Q rows that arrive, L local experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.diagnosis.meter import Meter
from dispatch.exchange.assignment_group import AssignmentGroup
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
from dispatch.exchange.exchange_group import ExchangeGroup, order_by_expert
from dispatch.exchange.payload import Payload
from dispatch.exchange.physical_experts import PhysicalExperts
from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.registry import BackendContext, one_row_a_rank, one_row_an_assignment, register_backend
from dispatch.exchange.token_exchange import PendingRows, TokenExchange
from dispatch.values import host_lists

_Started = tuple[PendingRows, TokenExchange]
_Exchanges = tuple[TokenExchange, ...]  # one for each group of ranks that a row passes, in order


@dataclass
class AllToAllDispatcher(PhysicalExperts, Dispatcher):
    """Sends one row for each (token, rank). The receiver copies it to its experts and returns one partial sum.

    At top-8 over 2 ranks that is a quarter of the rows of an exchange by assignments, in backward too. The idea is
    DeepEP's (arXiv 2412.19437, section 3.2.2). In bf16 a partial sum is rounded once more, before it travels back.

    per_assignment: send a row for each (token, expert) instead, see `AssignmentGroup`.
    payload: how rows are coded on the way to the experts. Returned sums and gradients are never coded.
    """

    num_experts: int
    ep_group: dist.ProcessGroup
    per_assignment: bool = False
    payload: Payload = "compute"
    meter: Meter = field(default_factory=Meter)
    buffer_pool: BufferPool = field(default_factory=BufferPool)

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement(self.num_experts, dist.get_world_size(self.ep_group))
        self.ep_rank = dist.get_rank(self.ep_group)
        self.groups = self._make_groups()

    def _make_groups(self) -> tuple[ExchangeGroup, ...]:
        kind = AssignmentGroup if self.per_assignment else ExchangeGroup
        return (kind(self.num_physical_P, self.ep_group, self.meter, self.buffer_pool),)

    def plan(self, topk_ids_TK: Tensor, num_chunks: int = 1) -> list[ChunkPlan]:
        """See `Dispatcher.plan`. Sends one message of a few integers to each rank of each group."""
        chunks = self.physical_ids(topk_ids_TK).tensor_split(num_chunks)
        with self.meter.span("dispatch", topk_ids_TK.device):
            *splits, counts_CL, places = host_lists(*self._exchange_sizes(chunks))
            self.meter.tracker.check_same_place(places, [group.process_group for group in self.groups])
        # `splits` has a table of input splits and one of output splits for each group, both with a row for each chunk.
        # A plan has the pair of rows of its chunk, for each group.
        by_group = [zip(sent, received, strict=True) for sent, received in zip(splits[::2], splits[1::2], strict=True)]
        by_chunk = zip(chunks, counts_CL, zip(*by_group, strict=True), strict=True)
        return [ChunkPlan(*each, self.meter.tracker.layer) for each in by_chunk]

    def _exchange_sizes(self, chunks: Sequence[Tensor]) -> list[Tensor]:
        """What `plan` needs on the host, as tensors on the device, so that `plan` copies and waits only once.

        For each group the rows to each rank (C, P) and from each rank (C, P); then the assignments of each local expert
        (C, L); last the places of the ranks of all groups, see `ExchangeGroup.exchange_sizes`.
        """
        (group,) = self.groups
        rows_CP, counts_CE = group.count(chunks)
        received_PCX, places_P = group.exchange_sizes(rows_CP.unsqueeze(2), counts_CE)
        return [rows_CP, received_PCX[..., 0].t(), received_PCX[..., 1:].sum(0), places_P]

    def max_sizes(self, plans: list[ChunkPlan]) -> tuple[int, int, int]:
        """See `Dispatcher.max_sizes`."""
        maxima = torch.tensor(super().max_sizes(plans), device=plans[0].topk_ids_TK.device)
        self.meter.tracker.run(dist.all_reduce, maxima, dist.ReduceOp.MAX, group=self.ep_group)
        all_rows, rows, tokens = maxima.tolist()
        return all_rows, rows, tokens

    def start_dispatch(self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan) -> PendingDispatch[_Started]:
        """See `Dispatcher.start_dispatch`. Sends the weights with their expert ids first, then the rows."""
        check_shapes(x_TH, plan.topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            exchange = self.groups[0].exchange(plan.topk_ids_TK, *plan.splits[0], self.payload, plan.layer)
        self.meter.count(routed=plan.topk_ids_TK.numel(), sent=plan.topk_ids_TK.numel())
        weights = topk_weights_TK.reshape(len(exchange.slots.first_S), exchange.ids_SW.shape[1])
        return PendingDispatch(plan, (exchange.start_dispatch(x_TH, weights), exchange))

    def finish_dispatch(self, pending: PendingDispatch[_Started]) -> tuple[Tensor, DispatchHandle[_Exchanges]]:
        """See `Dispatcher.finish_dispatch`. Each group after the first is inside a node: it is awaited at once."""
        plan, (rows, exchange) = pending.plan, pending.state
        rows_QH, weights_QW, ids_QW = rows.finish()
        exchanges = [exchange]
        for group, splits in zip(self.groups[1:], plan.splits[1:], strict=True):
            with self.meter.span("dispatch", rows_QH.device):
                exchange = group.exchange(ids_QW.to(torch.int64), *splits, self.payload, plan.layer)
            rows_QH, weights_QW, ids_QW = exchange.start_dispatch(rows_QH, weights_QW).finish()
            exchanges.append(exchange)
        counts_L = plan.tokens_per_local_expert_L
        with self.meter.span("dispatch", rows_QH.device):
            sources_R, weights_R = order_by_expert(ids_QW, weights_QW, sum(counts_L))
        self.meter.count(received=len(sources_R))
        return rows_QH, DispatchHandle(counts_L, sources_R, weights_R, len(rows_QH), tuple(exchanges))

    def start_combine(self, sums_QH: Tensor, handle: DispatchHandle[_Exchanges]) -> PendingCombine[PendingRows]:
        """See `Dispatcher.start_combine`. The exchanges are made in the opposite order."""
        first, *others = state_of_kind(handle, tuple)
        self.meter.count(returned=len(handle.row_weights_R))
        for exchange in reversed(others):
            (sums_QH,) = exchange.start_combine(sums_QH).finish()
        return PendingCombine(first.start_combine(sums_QH))

    def finish_combine(self, pending: PendingCombine[PendingRows]) -> Tensor:
        """See `Dispatcher.finish_combine`."""
        (y_TH,) = pending.state.finish()
        return y_TH


@register_backend("rank", hops=one_row_a_rank, takes_copies=True)
def _rank(context: BackendContext) -> Dispatcher:
    return _all_to_all(context, per_assignment=False)


@register_backend("assignment", hops=one_row_an_assignment, takes_copies=True)
def _assignment(context: BackendContext) -> Dispatcher:
    return _all_to_all(context, per_assignment=True)


def _all_to_all(context: BackendContext, *, per_assignment: bool) -> Dispatcher:
    shape = context.shape
    return AllToAllDispatcher(
        shape.num_experts, context.ep_group, per_assignment, shape.payload, context.meter, context.buffer_pool
    )
