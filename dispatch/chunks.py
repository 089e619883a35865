"""In which order a layer exchanges and computes the chunks of its batch, and how it keeps within memory.

Shapes: T tokens of this rank (may be 0), H hidden, K top-k, Q rows that arrive (may be 0).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dispatch.config import ScheduleConfig
from dispatch.exchange.dispatcher import ChunkPlan, Dispatcher, DispatchHandle
from dispatch.experts.stacked import Compute, Experts


def run_experts(
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
    sizes, counts = [len(plan.topk_ids_TK) for plan in plans], list[list[int]]()

    def layer_call(x_TH: Tensor, topk_weights_TK: Tensor, compute: Compute) -> Tensor:
        def counted(arrived_QH: Tensor, handle: DispatchHandle[Any]) -> Tensor:
            counts.append(handle.tokens_per_local_expert_L)
            return compute(arrived_QH, handle)

        chunks = list(zip(x_TH.split(sizes), topk_weights_TK.split(sizes), plans, strict=True))
        run = _in_rounds if in_rounds else _overlapped if schedule.overlap else _one_by_one
        parts, other = run(chunks, dispatcher, counted, meanwhile)
        y_TH = torch.cat(parts) if len(parts) > 1 else parts[0]
        return y_TH if other is None else y_TH + other

    y_TH: Tensor = experts(x_TH, topk_weights_TK, layer_call)
    dispatcher.meter.note_rows(max(map(sum, zip(*counts, strict=True))))
    return y_TH


_Chunk = tuple[Tensor, Tensor, ChunkPlan]
_Meanwhile = Callable[[], Tensor | None]
_Run = tuple[list[Tensor], Tensor | None]


def _plan(topk_ids_TK: Tensor, dispatcher: Dispatcher, schedule: ScheduleConfig) -> tuple[list[ChunkPlan], bool]:
    """The chunks, and whether they are rounds: as many as keep every rank within max_rows."""
    plans = dispatcher.plan(topk_ids_TK, schedule.num_chunks)
    if not schedule.max_rows:
        return plans, False
    rows, tokens = dispatcher.max_rows_and_tokens(plans)
    in_rounds = rows > schedule.max_rows
    # Chunks are not equally heavy, so that the first guess may not do. A chunk of one token a rank is the end.
    while rows > schedule.max_rows and tokens > 1:
        enough = len(plans) * -(-rows // schedule.max_rows)
        plans = dispatcher.plan(topk_ids_TK, min(enough, len(plans) * tokens))
        rows, tokens = dispatcher.max_rows_and_tokens(plans)
    return plans, in_rounds


def _overlapped(chunks: list[_Chunk], dispatcher: Dispatcher, compute: Compute, meanwhile: _Meanwhile) -> _Run:
    # What starts here early and is awaited late does so in backward too, where autograd walks this order back.
    dispatching = [dispatcher.start_dispatch(*chunk) for chunk in chunks]
    other = meanwhile()
    combining = []
    for pending in dispatching:
        arrived_QH, handle = dispatcher.finish_dispatch(pending)
        combining.append(dispatcher.start_combine(compute(arrived_QH, handle), handle))
    return [dispatcher.finish_combine(pending) for pending in combining], other


def _one_by_one(chunks: list[_Chunk], dispatcher: Dispatcher, compute: Compute, meanwhile: _Meanwhile) -> _Run:
    return [_round(*chunk, dispatcher, compute) for chunk in chunks], meanwhile()


def _in_rounds(chunks: list[_Chunk], dispatcher: Dispatcher, compute: Compute, meanwhile: _Meanwhile) -> _Run:
    # Nothing of a round is kept but its tokens: its rows travel again in backward. No layer draws random numbers.
    parts = [
        checkpoint(_round, *chunk, dispatcher, compute, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return parts, meanwhile()


def _round(x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan, dispatcher: Dispatcher, compute: Compute) -> Tensor:
    arrived_QH, handle = dispatcher.finish_dispatch(dispatcher.start_dispatch(x_TH, topk_weights_TK, plan))
    return dispatcher.combine(compute(arrived_QH, handle), handle)
