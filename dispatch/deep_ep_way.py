"""Calls of DeepEP in two halves, started and awaited apart, each with its backward.

Shapes: T tokens of a chunk on this rank (may be 0), K top-k, H hidden, Q rows that arrive (may be 0).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dispatch.dispatcher import ChunkPlan
from dispatch.exchange import Link
from dispatch.meter import Meter


@dataclass(frozen=True)
class Flight:
    """A started call of DeepEP: what it returned, to be read after its event, and what it reads until then."""

    landed: tuple[Tensor, ...]
    event: Any
    kept: tuple[Tensor, ...]


@dataclass(frozen=True)
class Way:
    """The way of one chunk's rows, known since they went it.

    handle: DeepEP's. ids_QK: local ids, -1 where an assignment is another rank's; not to be read before the first
    flight has landed. counts_L: rows of each local expert. sizes: rows for and from other ranks, int64 on the device.
    """

    plan: ChunkPlan
    buffer: Any
    handle: Any
    ids_QK: Tensor
    counts_L: list[int]
    sizes: tuple[Tensor, Tensor]
    meter: Meter
    link: Link

    @torch.no_grad()
    def out(self, rows_TH: Tensor) -> Flight:
        """Start to send rows where their tokens went. The sizes are known: the host does not wait."""
        rows_TH = rows_TH.contiguous()
        rows_QH, *_, event = self.buffer.dispatch(rows_TH, handle=self.handle, async_finish=True)
        self.count_bytes(self.sizes[0], rows_TH)
        return Flight((rows_QH,), event, (rows_TH,))

    @torch.no_grad()
    def home(self, rows_QH: Tensor, weights_QK: Tensor | None = None) -> Flight:
        """Start to send rows back, to be added up by token: y_TH, and with weights (T, K) of them likewise."""
        sent = tuple(tensor.contiguous() for tensor in (rows_QH, weights_QK) if tensor is not None)
        y_TH, sums_TK, event = self.buffer.combine(
            sent[0], self.handle, topk_weights=None if weights_QK is None else sent[1], async_finish=True
        )
        self.count_bytes(self.sizes[1], *sent)
        return Flight((y_TH,) if weights_QK is None else (y_TH, sums_TK), event, sent)

    def count_bytes(self, num_rows: Tensor, *tensors: Tensor) -> None:
        """Count that `num_rows` rows of the tensors go to other ranks."""
        row_bytes = sum(tensor.shape[1] * tensor.element_size() for tensor in tensors)
        self.meter.count_bytes(num_rows * row_bytes, self.link)


@dataclass
class Passage:
    """What is under way between the two halves of an exchange, in forward or in backward."""

    phase: str
    meter: Meter
    device: torch.device
    flights: list[Flight] = field(default_factory=list)

    def land(self) -> tuple[Tensor, ...]:
        """Wait: on CUDA the current stream does, not the host."""
        flight = self.flights.pop()  # else it would keep alive what activation recompute wants to free
        flight.event.current_stream_wait()
        return flight.landed


class Start(torch.autograd.Function):
    """The half that started before; gives the ticket by which autograd knows what follows. Its backward awaits."""

    @staticmethod
    def forward(ctx: Any, passage: Passage, *sent: Tensor) -> Tensor:
        ctx.passage = passage
        return sent[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _grad_ticket: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.passage.meter.span(ctx.passage.phase, ctx.passage.device):
            return None, *ctx.passage.land()


class Finish(torch.autograd.Function):
    """The half that awaits; its backward starts, by `turn`, what brings the gradients."""

    @staticmethod
    def forward(ctx: Any, _ticket: Tensor, passage: Passage, turn: Callable[..., Flight]) -> tuple[Tensor, ...]:
        ctx.passage, ctx.turn = passage, turn
        with passage.meter.span(passage.phase, passage.device):
            return passage.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        with ctx.passage.meter.span(ctx.passage.phase, ctx.passage.device):
            ctx.passage.flights = [ctx.turn(*grads)]
        return grads[0].new_empty(0), None, None
