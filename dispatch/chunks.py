"""In which order a layer exchanges and computes the chunks of its batch, and how it keeps within memory.

Shapes: T tokens of this rank (may be 0), H hidden, K top-k, Q rows that arrive (may be 0), C chunks, L local experts.
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
    shared_experts: Callable[[], Tensor | None],
) -> Tensor:
    """The weighted outputs of the routed experts plus the outputs of the shared experts: (T, H), in the dtype of x.

    shared_experts: computes the shared experts' outputs, (T, H); returns None in a layer without shared experts. It is
    called while rows travel, if the schedule overlaps.

    Collective over the EP group, in backward too.
    """
    plans, in_rounds = _plan(topk_ids_TK, dispatcher, schedule)
    sizes = [len(plan.topk_ids_TK) for plan in plans]
    counts_CL: list[list[int]] = []  # rows of each local expert; DeepEP learns them only when rows leave, not in `plan`

    def layer_call(x_TH: Tensor, topk_weights_TK: Tensor, compute: Compute) -> Tensor:
        def counted(arrived_QH: Tensor, handle: DispatchHandle[Any]) -> Tensor:
            counts_CL.append(handle.tokens_per_local_expert_L)
            return compute(arrived_QH, handle)

        chunks = list(zip(x_TH.split(sizes), topk_weights_TK.split(sizes), plans, strict=True))
        run = _in_rounds if in_rounds else _overlapped if schedule.overlap else _one_by_one
        parts, shared_TH = run(chunks, dispatcher, counted, shared_experts)
        y_TH = torch.cat(parts) if len(parts) > 1 else parts[0]
        return y_TH if shared_TH is None else y_TH + shared_TH

    # The experts call the exchange, and not the other way round: a hook on them, such as FSDP's, surrounds all chunks.
    y_TH: Tensor = experts(x_TH, topk_weights_TK, layer_call)
    dispatcher.meter.note_rows(max(map(sum, zip(*counts_CL, strict=True))))  # each expert's rows, summed over chunks
    return y_TH


_Chunk = tuple[Tensor, Tensor, ChunkPlan]
_Shared = Callable[[], Tensor | None]
_Outputs = tuple[list[Tensor], Tensor | None]  # of the routed experts by chunk, and of the shared experts


def _plan(topk_ids_TK: Tensor, dispatcher: Dispatcher, schedule: ScheduleConfig) -> tuple[list[ChunkPlan], bool]:
    """The chunks, and whether they must run one after the other with recompute, so that no rank exceeds max_rows."""
    plans = dispatcher.plan(topk_ids_TK, schedule.num_chunks)
    if not schedule.max_rows:
        return plans, False
    all_rows, rows, tokens = dispatcher.max_sizes(plans)
    in_rounds = all_rows > schedule.max_rows  # unless in rounds, all chunks are held at once
    # A loop, since chunks of equally many tokens do not bring equally many rows: one may still exceed max_rows. A chunk
    # of one token per rank cannot be cut further, even where it brings more than max_rows.
    while rows > schedule.max_rows and tokens > 1:
        num_chunks = len(plans) * -(-rows // schedule.max_rows)
        plans = dispatcher.plan(topk_ids_TK, min(num_chunks, len(plans) * tokens))
        _, rows, tokens = dispatcher.max_sizes(plans)
    return plans, in_rounds


def _overlapped(chunks: list[_Chunk], dispatcher: Dispatcher, compute: Compute, shared_experts: _Shared) -> _Outputs:
    # Autograd runs the backward of these calls in the opposite order, so what is started early and awaited late here is
    # so in backward too. The order must be the same on all ranks: torch matches the collectives of a group by order.
    dispatching = [dispatcher.start_dispatch(*chunk) for chunk in chunks]
    shared_TH = shared_experts()
    combining = []
    for pending in dispatching:
        arrived_QH, handle = dispatcher.finish_dispatch(pending)
        combining.append(dispatcher.start_combine(compute(arrived_QH, handle), handle))
    return [dispatcher.finish_combine(pending) for pending in combining], shared_TH


def _one_by_one(chunks: list[_Chunk], dispatcher: Dispatcher, compute: Compute, shared_experts: _Shared) -> _Outputs:
    return [_round(*chunk, dispatcher, compute) for chunk in chunks], shared_experts()


def _in_rounds(chunks: list[_Chunk], dispatcher: Dispatcher, compute: Compute, shared_experts: _Shared) -> _Outputs:
    # Recompute keeps only the tokens of a round; their rows travel again in backward. Nothing in a round draws random
    # numbers, so there is no random state to preserve.
    parts = [
        checkpoint(_round, *chunk, dispatcher, compute, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return parts, shared_experts()


def _round(x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan, dispatcher: Dispatcher, compute: Compute) -> Tensor:
    arrived_QH, handle = dispatcher.finish_dispatch(dispatcher.start_dispatch(x_TH, topk_weights_TK, plan))
    return dispatcher.combine(compute(arrived_QH, handle), handle)
