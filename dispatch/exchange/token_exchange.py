"""The all-to-all of one chunk's rows to the experts, and the one back; each has a start and a wait, in backward too.

Read `TokenExchange` first: it says what is sent and how the receiver reads it. `PendingRows` makes the start and the
wait two nodes of the autograd graph. `SplitSizes` hands rows to the backend.

Shapes: T tokens on this rank (may be 0), S rows that leave (copies of tokens), Q rows that arrive (both may be 0, both
count the rows that stay), H hidden, W expert ids of a row, P ranks of the group.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.diagnosis.activity import Splits
from dispatch.diagnosis.meter import Message, Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.payload import Payload, copy_viewed_as, decode_fp8, encode_fp8
from dispatch.exchange.row_map import RowMap

LinkKind = Literal["node", "network"]
Arriving = tuple[Tensor, Callable[[], object] | None]  # a tensor, and the call that waits for it; None if it is here
Span = Callable[[], AbstractContextManager[None]]  # measures the time inside
Send = Callable[..., list[Arriving]]
Receive = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class SplitSizes:
    """How many rows this rank sends to each rank of `group` and receives from it, and over which kind of link.

    input_splits, output_splits: length P, as host integers, which the backends take. On both sides rows lie in order of
    rank, but those that stay on this rank are last: they are copied once, straight to their place, where a backend
    would copy them through its own buffers. layer: the MoE layer of the rows, for errors in backward.
    """

    input_splits: list[int]
    output_splits: list[int]
    group: dist.ProcessGroup
    meter: Meter
    buffer_pool: BufferPool
    link: LinkKind = "network"
    layer: str = ""

    def reversed(self) -> "SplitSizes":
        """The sizes of the opposite direction, in which results, and the gradients of rows, travel."""
        return replace(self, input_splits=self.output_splits, output_splits=self.input_splits)

    @property
    def num_sent(self) -> int:
        """S: the rows for all ranks, those that stay on this rank among them."""
        return sum(self.input_splits)

    @property
    def num_staying(self) -> int:
        """Rows that this rank sends to itself: the last ones of both sides."""
        return self.input_splits[dist.get_rank(self.group)]

    def all_to_all(self, rows: Tensor) -> Arriving:
        """Start to send `rows`, (S, ...), which lie in the order that the class describes. Collective."""
        num_leaving = self.num_sent - self.num_staying
        received = self.buffer_pool.empty(sum(self.output_splits), *rows.shape[1:], like=rows)
        received[len(received) - self.num_staying :] = rows[num_leaving:]
        return self.all_to_all_into(received, rows[:num_leaving])

    def all_to_all_into(self, received: Tensor, rows: Tensor) -> Arriving:
        """Start to send the rows that leave into the head of `received`, whose tail holds those that stay. Collective.

        Raises:
            WrongSplits: the backend would be given other numbers than were announced.
        """
        rank, tracker = dist.get_rank(self.group), self.meter.tracker
        outgoing, incoming = (
            [*splits[:rank], 0, *splits[rank + 1 :]] for splits in (self.input_splits, self.output_splits)
        )
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        self.meter.note_message(Message(row_bytes, outgoing, incoming, self.group), self.link)
        if len(incoming) == 1:  # a group of this rank alone: all rows stay
            return received, None
        tracker.layer = self.layer
        splits = Splits(announced=outgoing, sent=outgoing, expected=incoming)
        head = received[: sum(incoming)]
        pending = tracker.start(
            dist.all_to_all_single, head, rows.contiguous(), incoming, outgoing, group=self.group, splits=splits
        )
        return received, pending.wait


@dataclass(frozen=True)
class PendingRows:
    """An exchange that has started and is not awaited yet. `start` and `finish` are two nodes of the autograd graph.

    Backward runs `finish` first, which starts to send the gradients of the results, and `start` later, which waits for
    them. So an exchange that forward starts early and awaits late is early and late in backward too, and the gradients
    of one chunk travel while another chunk is computed.

    anchor: an empty tensor from `start` to `finish`, by which autograd runs the one after the other; rows that are
    still in flight are no results yet. arriving: shared by both nodes; whichever waits empties it.
    """

    anchor: Tensor
    arriving: list[Arriving]
    span: Span
    receive: Receive
    send_gradients: Send

    @classmethod
    def start(
        cls,
        *tensors: Tensor,
        span: Span,
        send: Send,
        receive: Receive,
        send_gradients: Send,
        receive_gradients: Receive,
    ) -> "PendingRows":
        """Start to send `tensors`.

        Args:
            span: measures each of the four calls.
            send: starts to send the tensors.
            receive: turns what has arrived into the results of `finish`.
            send_gradients: starts to send back the gradients of these results.
            receive_gradients: turns what has arrived then into the gradients of the tensors.
        """
        arriving: list[Arriving] = []
        anchor = _Start.apply(arriving, span, send, receive_gradients, *tensors)
        return cls(anchor, arriving, span, receive, send_gradients)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait, and return the results."""
        results: tuple[Tensor, ...] = _Finish.apply(
            self.anchor, self.arriving, self.span, self.receive, self.send_gradients
        )
        return results


# The nodes keep the list, and not the PendingRows: its anchor refers to its node, and Python cannot free a reference
# cycle through C++. The cycle would keep the process groups of a gang that failed alive.
class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, arriving: list[Arriving], span: Span, send: Send, receive_gradients: Receive, *tensors: Tensor
    ) -> Tensor:
        ctx.arriving, ctx.span, ctx.receive_gradients = arriving, span, receive_gradients
        with span():
            arriving += send(*tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _grad_anchor: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.span():
            return None, None, None, None, *ctx.receive_gradients(*_wait(ctx.arriving))


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _anchor: Tensor, arriving: list[Arriving], span: Span, receive: Receive, send_gradients: Send
    ) -> tuple[Tensor, ...]:
        ctx.arriving, ctx.span, ctx.send_gradients = arriving, span, send_gradients
        with span():
            return receive(*_wait(arriving))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.span():
            ctx.arriving += ctx.send_gradients(*gradients)
        return gradients[0].new_empty(0), None, None, None, None  # first the gradient of the anchor, as empty as it is


def _wait(arriving: list[Arriving]) -> list[Tensor]:
    for _, wait in arriving:
        if wait is not None:
            wait()
    tensors = [tensor for tensor, _ in arriving]
    arriving.clear()  # autograd keeps this list until backward, and with it would keep the rows
    return tensors


@dataclass(frozen=True)
class TokenExchange:
    """Carries one chunk's tokens to the ranks of one group and the results back.

    rows: which token each leaving row is a copy of. slots: which row of combine weights goes with it. ids_SW: the
    expert ids of these weights, as local ids of the receiver. sizes: how many rows go to and come from each rank.
    """

    rows: RowMap
    slots: RowMap
    ids_SW: Tensor
    sizes: SplitSizes
    payload: Payload = "compute"

    def start_dispatch(self, x_TH: Tensor, weights_TW: Tensor) -> PendingRows:
        """Start to send each token's row and combine weights; `finish` returns rows_QH, weights_QW and ids_QW.

        Collective, in backward too, as is `start_combine`.
        """
        return PendingRows.start(
            x_TH,
            weights_TW,
            span=self._span("dispatch"),
            send=self._send_dispatch,
            receive=partial(
                self._receive_dispatch, hidden=x_TH.shape[1], dtype=x_TH.dtype, weight_dtype=weights_TW.dtype
            ),
            send_gradients=self._send_dispatch_gradients,
            receive_gradients=self._receive_dispatch_gradients,
        )

    def start_combine(self, sums_QH: Tensor) -> PendingRows:
        """Start to return each arrived row's expert output to its sender; `finish` sums them by token: (y_TH,)."""
        return PendingRows.start(
            sums_QH,
            span=self._span("combine"),
            send=lambda sums_QH: [self.sizes.reversed().all_to_all(sums_QH)],
            receive=lambda returned_SH: (self.rows.sum_no_grad(returned_SH),),
            send_gradients=lambda grad_TH: [self._send_copies(grad_TH)],
            receive_gradients=lambda grad_QH: (grad_QH,),
        )

    def _span(self, phase: str) -> Span:
        return partial(self.sizes.meter.span, phase, self.ids_SW.device)

    def _send_dispatch(self, x_TH: Tensor, weights_TW: Tensor) -> list[Arriving]:
        # Weights and ids as bytes of one message: two small messages would take their latency twice.
        weights_SW = weights_TW.index_select(0, self.slots.source_of_copy_A)
        slots = self.sizes.all_to_all(torch.cat([weights_SW.view(torch.uint8), self.ids_SW.view(torch.uint8)], 1))
        return [slots, self._send_copies(encode_fp8(x_TH) if self.payload == "fp8" else x_TH)]

    def _receive_dispatch(
        self, slots: Tensor, rows: Tensor, *, hidden: int, dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = slots.tensor_split([self.ids_SW.shape[1] * weight_dtype.itemsize], 1)
        rows_QH = decode_fp8(rows, hidden, dtype) if self.payload == "fp8" else rows
        return rows_QH, copy_viewed_as(weights, weight_dtype), copy_viewed_as(ids, self.ids_SW.dtype)

    def _send_dispatch_gradients(self, grad_QH: Tensor, grad_weights_QW: Tensor, _grad_ids: Tensor) -> list[Arriving]:
        # fp8 rows get uncoded gradients: rounding is treated as the identity (straight-through).
        back = self.sizes.reversed()
        return [back.all_to_all(grad_weights_QW), back.all_to_all(grad_QH)]

    def _receive_dispatch_gradients(self, grad_weights_SW: Tensor, grad_rows_SH: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows.sum_no_grad(grad_rows_SH), self.slots.sum_no_grad(grad_weights_SW)

    def _send_copies(self, rows_TX: Tensor) -> Arriving:
        """Start to send each token's row to each rank that needs it.

        As `sizes.all_to_all(self.rows.copy_no_grad(rows_TX))`, but a row that stays is copied once and not twice.
        """
        sizes, source_S = self.sizes, self.rows.source_of_copy_A
        num_leaving = sizes.num_sent - sizes.num_staying
        leaving = sizes.buffer_pool.empty(num_leaving, rows_TX.shape[1], like=rows_TX)
        received = sizes.buffer_pool.empty(sum(sizes.output_splits), rows_TX.shape[1], like=rows_TX)
        torch.index_select(rows_TX, 0, source_S[num_leaving:], out=received[len(received) - sizes.num_staying :])
        torch.index_select(rows_TX, 0, source_S[:num_leaving], out=leaving)
        return sizes.all_to_all_into(received, leaving)
