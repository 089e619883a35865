"""Rows on their way between ranks: one exchange each way, started and awaited apart, with its backward.

Shapes: T tokens on this rank (may be 0), S rows that leave (copies of tokens), Q rows that arrive (both may be 0, both
count the rows that stay), H hidden, P ranks of the group.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.activity import Splits
from dispatch.board import Started
from dispatch.meter import Message, Meter
from dispatch.payload import Payload, decode_fp8, encode_fp8
from dispatch.recycler import Recycler
from dispatch.row_map import RowMap

Link = Literal["node", "network"]


@dataclass(frozen=True)
class Route:
    """How many rows go where.

    input_splits, output_splits: length P, rows for and from each rank, as host integers. Rows lie in order of rank, but
    those that stay come last, so that they are copied and never handed to the backend. layer: whose rows they are: in
    backward nobody else knows.
    """

    input_splits: list[int]
    output_splits: list[int]
    group: dist.ProcessGroup
    meter: Meter
    recycler: Recycler
    link: Link = "network"
    layer: str = ""

    def back(self) -> "Route":
        """The way that answers and gradients take."""
        return replace(self, input_splits=self.output_splits, output_splits=self.input_splits)

    @property
    def num_leaving(self) -> int:
        """S."""
        return sum(self.input_splits)

    @property
    def num_staying(self) -> int:
        """The last rows of both sides: they are this rank's own."""
        return self.input_splits[dist.get_rank(self.group)]

    def start(self, rows: Tensor, received: Tensor) -> "Flight":
        """Send `rows`, in order of rank, into the head of `received`; both without the rows that stay. Collective.

        Raises:
            WrongSplits: the backend would be given other numbers than were announced.
        """
        me, board = dist.get_rank(self.group), self.meter.board
        incoming, announced = ([*sizes[:me], 0, *sizes[me + 1 :]] for sizes in (self.output_splits, self.input_splits))
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        self.meter.note_message(Message(row_bytes, announced, incoming, self.group), self.link)
        if len(incoming) == 1:
            return Flight(received, rows, None)
        board.layer = self.layer
        splits = Splits(announced=announced, sent=board.told_to_send(announced), expected=incoming)
        rows, head = rows.contiguous(), received[: sum(incoming)]
        flight = board.start(dist.all_to_all_single, head, rows, incoming, splits.sent, group=self.group, splits=splits)
        return Flight(received, rows, flight)


@dataclass(frozen=True)
class Flight:
    """A started exchange. `received` may be read after `wait`, `sent` must stay as it is until then."""

    received: Tensor
    sent: Tensor
    work: Started | None

    def wait(self) -> Tensor:
        """What arrived, the own rows last. On CUDA the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.received


@dataclass
class _Passage:
    """What is under way between the two halves of an exchange, in forward or in backward."""

    flights: list[Flight] = field(default_factory=list)

    def land(self) -> list[Tensor]:
        landed = [flight.wait() for flight in self.flights]
        self.flights = []  # else it would keep alive what activation recompute wants to free
        return landed


@dataclass(frozen=True)
class UnderWay:
    """Rows that left and are not awaited yet. ticket: an empty tensor by which autograd knows what follows what."""

    ticket: Tensor
    passage: _Passage
    hidden: int
    dtype: torch.dtype
    weight_dtype: torch.dtype


@dataclass(frozen=True)
class Trip:
    """The way of one chunk's tokens over one group of ranks, there and back.

    Each half of an exchange is a node of autograd, and its backward is a half of the opposite exchange: what starts
    early and is awaited late in forward does so in backward too, with whatever a layer computes in between.

    rows: which token each leaving row is a copy of. slots: which row of combine weights goes with it. ids_SW: the
    expert ids of these weights, as the receiver numbers them. route: how many rows go where.
    """

    rows: RowMap
    slots: RowMap
    ids_SW: Tensor
    route: Route
    payload: Payload = "compute"

    def depart(self, x_TH: Tensor, weights_TW: Tensor) -> UnderWay:
        """Start to send each token's row and combine weights. Collective, in backward too, as are the other three."""
        passage = _Passage()
        ticket = _Depart.apply(x_TH, weights_TW, self, passage)
        return UnderWay(ticket, passage, x_TH.shape[1], x_TH.dtype, weights_TW.dtype)

    def arrive(self, under_way: UnderWay) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for arrived_QH, their weights_QW and their ids_QW."""
        arrived: tuple[Tensor, Tensor, Tensor] = _Arrive.apply(under_way.ticket, under_way, self)
        return arrived

    def turn_back(self, sums_QH: Tensor) -> UnderWay:
        """Start to send back what became of each arrived row."""
        passage = _Passage()
        ticket = _TurnBack.apply(sums_QH, self, passage)
        return UnderWay(ticket, passage, sums_QH.shape[1], sums_QH.dtype, sums_QH.dtype)

    def come_home(self, under_way: UnderWay) -> Tensor:
        """Wait, and sum what came back for each token: y_TH."""
        y_TH: Tensor = _ComeHome.apply(under_way.ticket, under_way.passage, self)
        return y_TH

    def _send(self, rows_TX: Tensor) -> Flight:
        """A copy of each token's row to each rank of the map; those that stay are gathered where they will lie."""
        route, source_S = self.route, self.rows.source_of_copy_A
        num_sent, num_received = (
            sum(splits) - route.num_staying for splits in (route.input_splits, route.output_splits)
        )
        leaving = route.recycler.empty(num_sent, rows_TX.shape[1], like=rows_TX)
        received = route.recycler.empty(num_received + route.num_staying, rows_TX.shape[1], like=rows_TX)
        torch.index_select(rows_TX, 0, source_S[num_sent:], out=received[num_received:])
        torch.index_select(rows_TX, 0, source_S[:num_sent], out=leaving)
        return route.start(leaving, received)

    def _send_slots(self, weights_TW: Tensor) -> Flight:
        """Weights and ids of each leaving row as bytes of one message."""
        weights_SW = weights_TW.index_select(0, self.slots.source_of_copy_A)
        return _swap(self.route, torch.cat([weights_SW.view(torch.uint8), self.ids_SW.view(torch.uint8)], 1))

    def _split_slots(self, bytes_QB: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        width = self.ids_SW.shape[1] * weight_dtype.itemsize
        # A clone, since contiguous() leaves the stride of a single row, which no other dtype can view.
        parts = (
            part.clone(memory_format=torch.contiguous_format) for part in (bytes_QB[:, :width], bytes_QB[:, width:])
        )
        return next(parts).view(weight_dtype), next(parts).view(self.ids_SW.dtype)


def _swap(route: Route, rows: Tensor) -> Flight:
    """Send rows that lie in order of rank, the staying ones last."""
    num_staying, total = route.num_staying, sum(route.output_splits)
    received = route.recycler.empty(total, *rows.shape[1:], like=rows)
    received[total - num_staying :] = rows[len(rows) - num_staying :]
    return route.start(rows[: len(rows) - num_staying], received)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weights_TW: Tensor, trip: Trip, passage: _Passage) -> Tensor:
        ctx.trip, ctx.passage = trip, passage
        with trip.route.meter.span("dispatch", x_TH.device):
            # Weights and ids first: with them the receiver orders the rows that are still under way.
            slots = trip._send_slots(weights_TW)  # noqa: SLF001 - two sides of one thing, here and below
            rows_TX = encode_fp8(x_TH) if trip.payload == "fp8" else x_TH
            passage.flights = [slots, trip._send(rows_TX)]  # noqa: SLF001
        return x_TH.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _grad_ticket: Tensor) -> tuple[Tensor | None, ...]:
        trip: Trip = ctx.trip
        with trip.route.meter.span("dispatch", trip.ids_SW.device):
            grad_weights_SW, grad_rows_SH = ctx.passage.land()
            return trip.rows.sum_of(grad_rows_SH), trip.slots.sum_of(grad_weights_SW), None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _ticket: Tensor, under_way: UnderWay, trip: Trip) -> tuple[Tensor, Tensor, Tensor]:
        ctx.passage, ctx.trip = under_way.passage, trip
        with trip.route.meter.span("dispatch", trip.ids_SW.device):
            slots, rows = under_way.passage.land()
            weights_QW, ids_QW = trip._split_slots(slots, under_way.weight_dtype)  # noqa: SLF001
            rows_QH = decode_fp8(rows, under_way.hidden, under_way.dtype) if trip.payload == "fp8" else rows
        ctx.mark_non_differentiable(ids_QW)
        return rows_QH, weights_QW, ids_QW

    @staticmethod
    def backward(ctx: Any, grad_QH: Tensor, grad_weights_QW: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        route = ctx.trip.route.back()
        with route.meter.span("dispatch", grad_QH.device):
            # What was coded travels back uncoded: the gradient of rounding is taken to be that of the identity.
            ctx.passage.flights = [_swap(route, grad_weights_QW), _swap(route, grad_QH)]
        return grad_QH.new_empty(0), None, None


class _TurnBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums_QH: Tensor, trip: Trip, passage: _Passage) -> Tensor:
        ctx.passage, ctx.meter = passage, trip.route.meter
        with ctx.meter.span("combine", sums_QH.device):
            passage.flights = [_swap(trip.route.back(), sums_QH)]
        return sums_QH.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad_ticket: Tensor) -> tuple[Tensor, None, None]:
        with ctx.meter.span("combine", grad_ticket.device):
            return ctx.passage.land()[0], None, None


class _ComeHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _ticket: Tensor, passage: _Passage, trip: Trip) -> Tensor:
        ctx.passage, ctx.trip = passage, trip
        with trip.route.meter.span("combine", trip.ids_SW.device):
            return trip.rows.sum_of(passage.land()[0])

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None]:
        trip: Trip = ctx.trip
        with trip.route.meter.span("combine", grad_TH.device):
            ctx.passage.flights = [trip._send(grad_TH)]  # noqa: SLF001
        return grad_TH.new_empty(0), None, None
