"""The exchanges between EP ranks by all-to-all, on any backend of torch.distributed (NCCL and gloo, the same code).

`AllToAllDispatcher` takes one hop over the EP group, with a row for each (token, rank) or for each (token, expert);
`dispatch.node_aware` takes two.

Shapes: T tokens of a chunk on this rank (may be 0), K top-k, H hidden, C chunks, Q rows that arrive, L local experts.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.dispatcher import (
    ChunkPlan,
    Dispatcher,
    DispatchHandle,
    UnderWay,
    busiest_here,
    check_shapes,
    chunk_slices,
)
from dispatch.exchange import Trip
from dispatch.hop import Hop, fan_out
from dispatch.meter import Meter
from dispatch.payload import Payload
from dispatch.placement import ExpertPlacement
from dispatch.recycler import Recycler


@dataclass
class AllToAllDispatcher(Dispatcher):
    """One row for each (token, rank): copied to its experts where it arrives, and one partial sum comes back.

    At top-8 over 2 ranks a quarter of the rows of the usual exchange, and a quarter of the gradients. The idea is
    DeepEP's (arXiv 2412.19437, section 3.2.2), here in plain torch. In bf16 a partial sum is rounded once more before
    it comes back.

    per_assignment: a row for each (token, expert) instead: the usual exchange, best where a token's experts are nearly
    all on different ranks. payload: what of a row travels to the experts; what comes back is never coded.
    """

    num_experts: int
    ep_group: dist.ProcessGroup
    per_assignment: bool = False
    payload: Payload = "compute"
    meter: Meter = field(default_factory=Meter)
    recycler: Recycler = field(default_factory=Recycler)

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement(self.num_experts, dist.get_world_size(self.ep_group))
        self.ep_rank = dist.get_rank(self.ep_group)
        self.hops = self._make_hops()

    def _make_hops(self) -> tuple[Hop, ...]:
        experts_P = self.placement.num_local_experts
        return (Hop(experts_P, self.ep_group, self.meter, self.recycler, per_assignment=self.per_assignment),)

    def plan(self, topk_ids_TK: Tensor, num_chunks: int = 1) -> list[ChunkPlan]:
        """See `Dispatcher.plan`. One message of a few integers for each hop."""
        pieces = chunk_slices(len(topk_ids_TK), num_chunks)
        chunks = [topk_ids_TK[piece] for piece in pieces]
        with self.meter.span("dispatch", topk_ids_TK.device):
            *flows, counts_CL, places = host_lists(*self._flows(chunks))
            self.meter.board.check_met(places, [hop.group for hop in self.hops])
        by_hop = [list(zip(there, back, strict=True)) for there, back in zip(flows[::2], flows[1::2], strict=True)]
        return [
            ChunkPlan(
                pieces[chunk],
                chunks[chunk],
                counts_CL[chunk],
                tuple(splits[chunk] for splits in by_hop),
                self.meter.board.layer,
            )
            for chunk in range(num_chunks)
        ]

    def _flows(self, chunks: list[Tensor]) -> list[Tensor]:
        """Rows to and from each rank, both (C, P), and assignments of each local expert, (C, L), on the device.

        Last the places of the ranks of all hops, see `Hop.swap_sizes`.
        """
        (hop,) = self.hops
        rows_CP, counts_CE = hop.count(chunks)
        came_PCX, places_P = hop.swap_sizes(rows_CP.unsqueeze(2), counts_CE)
        return [rows_CP, came_PCX[..., 0].t(), came_PCX[..., 1:].sum(0), places_P]

    def busiest(self, plans: list[ChunkPlan]) -> tuple[int, int]:
        """See `Dispatcher.busiest`."""
        most = torch.tensor(busiest_here(plans), device=plans[0].topk_ids_TK.device)
        self.meter.board.run(dist.all_reduce, most, dist.ReduceOp.MAX, group=self.ep_group)
        rows, tokens = most.tolist()
        return rows, tokens

    def start_dispatch(self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan) -> UnderWay:
        """See `Dispatcher.start_dispatch`. On the wire: weights with ids, then rows."""
        check_shapes(x_TH, plan.topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            trip = self.hops[0].trip(plan.topk_ids_TK, *plan.splits[0], self.payload, plan.layer)
        self.meter.count(routed=plan.topk_ids_TK.numel(), sent=plan.topk_ids_TK.numel())
        weights = topk_weights_TK.reshape(len(trip.slots.first_S), trip.ids_SW.shape[1])
        return UnderWay(plan, trip.depart(x_TH, weights), (trip,))

    def finish_dispatch(self, under_way: UnderWay) -> tuple[Tensor, DispatchHandle]:
        """See `Dispatcher.finish_dispatch`. Hops after the first are short: they are not left under way."""
        plan, trips = under_way.plan, under_way.trips
        rows_QH, weights_QW, ids_QW = trips[0].arrive(under_way.rows)
        for hop, splits in zip(self.hops[1:], plan.splits[1:], strict=True):
            with self.meter.span("dispatch", rows_QH.device):
                trip = hop.trip(ids_QW.to(torch.int64), *splits, self.payload, plan.layer)
            rows_QH, weights_QW, ids_QW = trip.arrive(trip.depart(rows_QH, weights_QW))
            trips = (*trips, trip)
        counts_L = plan.tokens_per_local_expert_L
        with self.meter.span("dispatch", rows_QH.device):
            sources_R, weights_R = fan_out(ids_QW, weights_QW, sum(counts_L))
        self.meter.count(received=len(sources_R))
        return rows_QH, DispatchHandle(counts_L, sources_R, weights_R, len(rows_QH), (plan, trips))

    def start_combine(self, sums_QH: Tensor, handle: DispatchHandle) -> UnderWay:
        """See `Dispatcher.start_combine`.

        Raises:
            ValueError: the handle is of another kind of dispatcher.
        """
        if handle.way_back is None:
            raise ValueError("this handle is of a LocalDispatcher; combine with the dispatcher that dispatched")
        self.meter.count(returned=len(handle.row_weights_R))
        plan, trips = handle.way_back
        for trip in reversed(trips[1:]):
            sums_QH = trip.come_home(trip.turn_back(sums_QH))
        return UnderWay(plan, trips[0].turn_back(sums_QH), trips)

    def finish_combine(self, under_way: UnderWay) -> Tensor:
        """See `Dispatcher.finish_combine`."""
        trip: Trip = under_way.trips[0]
        return trip.come_home(under_way.rows)


def host_lists(*tensors: Tensor) -> list[Any]:
    """The tensors as nested lists. Waits for the device, once for all of them."""
    host = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = host.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).tolist() for part, tensor in zip(parts, tensors, strict=True)]
