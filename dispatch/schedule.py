"""In which order a layer exchanges and computes the chunks of its batch, and how it keeps within memory.

Shapes: T tokens of this rank (may be 0), H hidden, K top-k, Q rows that arrive (may be 0).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dispatch.dispatcher import ChunkPlan, Dispatcher, DispatchHandle
from dispatch.errors import InvalidValue
from dispatch.experts import Experts


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How an MoE layer orders its work.

    Results do not depend on it, but for rounding: a matmul of other rows may sum in another order.
    """

    num_chunks: int = 1
    """Runs of tokens of a batch: while one is computed, the rows of the others travel, in backward too. Worth it where
    a device or a thread of its own carries the rows; not on CPUs whose cores do both."""
    overlap: bool = True
    """Compute shared experts and other chunks while rows travel. Off waits for every exchange at once, to compare."""
    max_rows: int = 0
    """Most expert rows that a rank holds at once; 0 for no bound. Where a batch would bring more to any rank, all ranks
    work in as many rounds as it takes, and recompute them in backward: slower, but no token is dropped and memory
    does not grow with imbalance."""

    def __post_init__(self) -> None:
        if self.num_chunks < 1:
            raise InvalidValue(f"num_chunks ({self.num_chunks}) must be at least 1; 1 does not cut the batch")
        if self.max_rows < 0:
            raise InvalidValue(f"max_rows ({self.max_rows}) must be 0 (no bound) or a positive number of rows")


def mix(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    dispatcher: Dispatcher,
    experts: Experts,
    schedule: ScheduleConfig,
    meanwhile: Callable[[], Tensor | None],
) -> Tensor:
    """The experts' weighted outputs for every token, plus what `meanwhile` computes: (T, H), in the dtype of x.

    Collective over the EP group, in backward too.
    """
    plans, in_rounds = _plan(topk_ids_TK, dispatcher, schedule)
    sizes = [plan.tokens.stop - plan.tokens.start for plan in plans]
    weights, counts = experts.weights(x_TH.dtype), list[list[int]]()

    def compute(arrived_QH: Tensor, handle: DispatchHandle) -> Tensor:
        counts.append(handle.tokens_per_local_expert_L)
        sums_QH: Tensor = experts(arrived_QH, handle, weights)
        return sums_QH

    chunks = list(zip(x_TH.split(sizes), topk_weights_TK.split(sizes), plans, strict=True))
    run = _in_rounds if in_rounds else _overlapped if schedule.overlap else _one_by_one
    parts, other = run(chunks, dispatcher, compute, meanwhile)
    dispatcher.meter.note_rows(max(map(sum, zip(*counts, strict=True))))
    y_TH = torch.cat(parts) if len(parts) > 1 else parts[0]
    return y_TH if other is None else y_TH + other


_Chunk = tuple[Tensor, Tensor, ChunkPlan]
_Compute = Callable[[Tensor, DispatchHandle], Tensor]
_Run = tuple[list[Tensor], Tensor | None]


def _plan(topk_ids_TK: Tensor, dispatcher: Dispatcher, schedule: ScheduleConfig) -> tuple[list[ChunkPlan], bool]:
    """The chunks, and whether they are rounds: as many as keep every rank within max_rows."""
    plans = dispatcher.plan(topk_ids_TK, schedule.num_chunks)
    if not schedule.max_rows:
        return plans, False
    rows, tokens = dispatcher.busiest(plans)
    in_rounds = rows > schedule.max_rows
    # Chunks are not equally heavy, so that the first guess may not do. A chunk of one token a rank is the end.
    while rows > schedule.max_rows and tokens > 1:
        enough = len(plans) * -(-rows // schedule.max_rows)
        plans = dispatcher.plan(topk_ids_TK, min(enough, len(plans) * tokens))
        rows, tokens = dispatcher.busiest(plans)
    return plans, in_rounds


def _overlapped(
    chunks: list[_Chunk],
    dispatcher: Dispatcher,
    compute: _Compute,
    meanwhile: Callable[[], Tensor | None],
) -> _Run:
    # What starts here early and is awaited late does so in backward too, where autograd walks this order back.
    going = [dispatcher.start_dispatch(*chunk) for chunk in chunks]
    other = meanwhile()
    returning = []
    for under_way in going:
        arrived_QH, handle = dispatcher.finish_dispatch(under_way)
        returning.append(dispatcher.start_combine(compute(arrived_QH, handle), handle))
    return [dispatcher.finish_combine(under_way) for under_way in returning], other


def _one_by_one(
    chunks: list[_Chunk],
    dispatcher: Dispatcher,
    compute: _Compute,
    meanwhile: Callable[[], Tensor | None],
) -> _Run:
    return [_round(*chunk, dispatcher, compute) for chunk in chunks], meanwhile()


def _in_rounds(
    chunks: list[_Chunk],
    dispatcher: Dispatcher,
    compute: _Compute,
    meanwhile: Callable[[], Tensor | None],
) -> _Run:
    # Nothing of a round is kept but its tokens: its rows travel again in backward. No layer draws random numbers.
    parts = [
        checkpoint(_round, *chunk, dispatcher, compute, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return parts, meanwhile()


def _round(
    x_TH: Tensor,
    topk_weights_TK: Tensor,
    plan: ChunkPlan,
    dispatcher: Dispatcher,
    compute: _Compute,
) -> Tensor:
    arrived_QH, handle = dispatcher.finish_dispatch(dispatcher.start_dispatch(x_TH, topk_weights_TK, plan))
    return dispatcher.combine(compute(arrived_QH, handle), handle)
