"""The all-to-all of one chunk's rows: to the experts and back, each started and awaited apart, with its gradients.

Read `TokenExchange` first: what is sent and what is made of it. `PendingRows` ties the two halves of an exchange to
autograd, `SplitSizes` hands rows to the backend.

Shapes: T tokens on this rank (may be 0), S rows that leave (copies of tokens), Q rows that arrive (both may be 0, both
count the rows that stay), H hidden, W expert ids a row, P ranks of the group.
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
from dispatch.exchange.payload import Payload, decode_fp8, encode_fp8
from dispatch.exchange.row_map import RowMap

LinkKind = Literal["node", "network"]
Arriving = tuple[Tensor, Callable[[], object] | None]  # a tensor, and what waits until it may be read
Span = Callable[[], AbstractContextManager[None]]  # measures what happens inside
Send = Callable[..., list[Arriving]]
Receive = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class SplitSizes:
    """How many rows go to which rank of `group` over a kind of link, and come from it.

    input_splits, output_splits: length P, as host integers. On both sides rows lie in order of rank, but those that
    stay on this rank come last: they are copied, and never handed to the backend. layer: the MoE layer of the rows,
    which backward could not know otherwise.
    """

    input_splits: list[int]
    output_splits: list[int]
    group: dist.ProcessGroup
    meter: Meter
    buffer_pool: BufferPool
    link: LinkKind = "network"
    layer: str = ""

    def reversed(self) -> "SplitSizes":
        """The sizes of the opposite direction, in which results and gradients travel."""
        return replace(self, input_splits=self.output_splits, output_splits=self.input_splits)

    @property
    def num_sent(self) -> int:
        """Rows that leave, S; those that stay are counted too."""
        return sum(self.input_splits)

    @property
    def num_staying(self) -> int:
        """Rows that this rank sends to itself: the last ones of both sides."""
        return self.input_splits[dist.get_rank(self.group)]

    def swap(self, rows: Tensor) -> Arriving:
        """Start to send `rows`, (S, ...), which lie in the order that the class describes. Collective."""
        num_staying, total = self.num_staying, sum(self.output_splits)
        received = self.buffer_pool.empty(total, *rows.shape[1:], like=rows)
        received[total - num_staying :] = rows[len(rows) - num_staying :]
        return self.start(rows[: len(rows) - num_staying], received)

    def start(self, rows: Tensor, received: Tensor) -> Arriving:
        """Start to send `rows` into the head of `received`, whose tail holds the rows that stay. Collective.

        Raises:
            WrongSplits: the backend would be given other numbers than were announced.
        """
        me, tracker = dist.get_rank(self.group), self.meter.tracker
        incoming, announced = ([*sizes[:me], 0, *sizes[me + 1 :]] for sizes in (self.output_splits, self.input_splits))
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        self.meter.note_message(Message(row_bytes, announced, incoming, self.group), self.link)
        if len(incoming) == 1:
            return received, None
        tracker.layer = self.layer
        splits = Splits(announced=announced, sent=announced, expected=incoming)
        head = received[: sum(incoming)]
        pending = tracker.start(
            dist.all_to_all_single, head, rows.contiguous(), incoming, announced, group=self.group, splits=splits
        )
        return received, pending.wait


@dataclass(frozen=True)
class PendingRows:
    """An exchange whose first half has started and whose second half waits.

    Each half is a node of autograd, and its backward is a half of the exchange of gradients: `finish` in backward
    starts to send them, `start` waits for them. So what forward starts early and awaits late, backward does too, and
    the gradients of one chunk travel while another chunk is computed.

    anchor: an empty tensor by which autograd knows that `finish` follows `start`; rows in flight are no tensors yet.
    arriving: shared by both nodes. The node that waits empties it, in forward and again in backward.
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
            send, receive: start to send the tensors; turn what arrives into the results of `finish`.
            send_gradients, receive_gradients: start to return the gradients of these results; turn what arrives then
                into the gradients of the tensors.
        """
        arriving: list[Arriving] = []
        anchor = _Start.apply(arriving, span, send, receive_gradients, *tensors)
        return cls(anchor, arriving, span, receive, send_gradients)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait, and return the results."""
        halves = (self.receive, self.send_gradients)
        results: tuple[Tensor, ...] = _Finish.apply(self.anchor, self.arriving, self.span, *halves)
        return results


# The nodes keep the list and not the PendingRows, whose anchor refers to its node: Python could not free that circle,
# and what it holds of the process groups would outlive a gang that failed.
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
        return gradients[0].new_empty(0), None, None, None, None


def _wait(arriving: list[Arriving]) -> list[Tensor]:
    for _, wait in arriving:
        if wait is not None:
            wait()
    tensors = [tensor for tensor, _ in arriving]
    arriving.clear()  # autograd keeps the list, and activation recompute wants the rows to be freed
    return tensors


@dataclass(frozen=True)
class TokenExchange:
    """Carries one chunk's tokens to the ranks of one group and the results back.

    rows: which token each leaving row is a copy of. slots: which row of combine weights goes with it. ids_SW: the
    expert ids of these weights, as the receiver numbers them. sizes: how many rows go where.
    """

    rows: RowMap
    slots: RowMap
    ids_SW: Tensor
    sizes: SplitSizes
    payload: Payload = "compute"

    def start_dispatch(self, x_TH: Tensor, weights_TW: Tensor) -> PendingRows:
        """Start to send each token's row and combine weights; it will be rows_QH, weights_QW and ids_QW.

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
        """Start to return each arrived row's expert output to its sender; it will be summed by token: (y_TH,)."""
        return PendingRows.start(
            sums_QH,
            span=self._span("combine"),
            send=lambda sums_QH: [self.sizes.reversed().swap(sums_QH)],
            receive=lambda returned_SH: (self.rows.sum_of(returned_SH),),
            send_gradients=lambda grad_TH: [self._send_copies(grad_TH)],
            receive_gradients=lambda grad_QH: (grad_QH,),
        )

    def _span(self, phase: str) -> Span:
        return partial(self.sizes.meter.span, phase, self.ids_SW.device)

    def _send_dispatch(self, x_TH: Tensor, weights_TW: Tensor) -> list[Arriving]:
        # Weights and ids first, as bytes of one message: with them the receiver orders the rows still in flight.
        weights_SW = weights_TW.index_select(0, self.slots.source_of_copy_A)
        slots = self.sizes.swap(torch.cat([weights_SW.view(torch.uint8), self.ids_SW.view(torch.uint8)], 1))
        return [slots, self._send_copies(encode_fp8(x_TH) if self.payload == "fp8" else x_TH)]

    def _receive_dispatch(
        self, slots: Tensor, rows: Tensor, *, hidden: int, dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = self.ids_SW.shape[1] * weight_dtype.itemsize
        # A clone, since contiguous() leaves the stride of a single row, which no other dtype can view.
        weights, ids = (part.clone(memory_format=torch.contiguous_format) for part in slots.tensor_split([width], 1))
        rows_QH = decode_fp8(rows, hidden, dtype) if self.payload == "fp8" else rows
        return rows_QH, weights.view(weight_dtype), ids.view(self.ids_SW.dtype)

    def _send_dispatch_gradients(self, grad_QH: Tensor, grad_weights_QW: Tensor, _: Tensor) -> list[Arriving]:
        # What was coded travels back uncoded: the gradient of rounding is taken to be that of the identity.
        back = self.sizes.reversed()
        return [back.swap(grad_weights_QW), back.swap(grad_QH)]

    def _receive_dispatch_gradients(self, grad_weights_SW: Tensor, grad_rows_SH: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows.sum_of(grad_rows_SH), self.slots.sum_of(grad_weights_SW)

    def _send_copies(self, rows_TX: Tensor) -> Arriving:
        """Start to send each token's row to each rank of the map; a row that stays is copied straight to its place."""
        sizes, source_S = self.sizes, self.rows.source_of_copy_A
        num_leaving = sizes.num_sent - sizes.num_staying
        leaving = sizes.buffer_pool.empty(num_leaving, rows_TX.shape[1], like=rows_TX)
        received = sizes.buffer_pool.empty(sum(sizes.output_splits), rows_TX.shape[1], like=rows_TX)
        torch.index_select(rows_TX, 0, source_S[num_leaving:], out=received[len(received) - sizes.num_staying :])
        torch.index_select(rows_TX, 0, source_S[:num_leaving], out=leaving)
        return sizes.start(leaving, received)
