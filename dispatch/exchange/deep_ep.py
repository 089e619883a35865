"""The exchange by DeepEP (github.com/deepseek-ai/DeepEP), for NVIDIA GPUs where the package `deep_ep` is installed.

Its normal kernels send a row for each (token, rank), by NVLink inside a node and RDMA between nodes, and add up what
comes back. Written against the interface of `deep_ep.Buffer` in version 2.1.0; not yet run on a GPU: docs/testing.md.

Shapes: T tokens of a chunk on this rank (may be 0), K top-k, H hidden, Q rows that arrive (may be 0), C chunks, E
experts, L local experts, P EP ranks.
"""

import importlib
import importlib.util
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.diagnosis.meter import Meter
from dispatch.errors import InvalidValue
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
from dispatch.exchange.exchange_group import order_by_expert
from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.registry import BackendContext, ExchangeShape, one_row_a_rank, register_backend
from dispatch.exchange.token_exchange import Arriving, LinkKind, PendingRows
from dispatch.routing.selection import count_by_expert

# Limits of the kernels of 2.1.0. They are checked here, since in DeepEP most are device assertions, which kill the
# process.
EP_SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # DeepEP has settings for these numbers of ranks only
MAX_TOP_K = 32  # the lanes of a warp copy the ids of a row, one id each
MAX_LOCAL_EXPERTS = 128  # one thread each
NODE_RANKS = 8  # DeepEP assumes that a group of at most this many ranks is on one node
# (multiple of, at most) for the elements of a bf16 row. Inside a node a bulk copy takes half a row, in 16-byte words;
# between nodes it takes a whole row, in units of 512 bytes. A row must fit into the shared memory of a warp.
HIDDEN_IN_NODE, HIDDEN_BETWEEN_NODES = (16, 8176), (256, 7936)


def check_available() -> None:
    """Raise InvalidValue, naming what is missing, unless this machine has a CUDA device and `deep_ep`."""
    missing = [] if torch.cuda.is_available() else ["a CUDA device that torch sees"]
    if importlib.util.find_spec("deep_ep") is None:
        missing.append("the package deep_ep (install it from github.com/deepseek-ai/DeepEP)")
    if missing:
        raise InvalidValue(f"exchange 'deep_ep' needs {' and '.join(missing)}; install that, or take exchange 'auto'")


def check_sizes(num_experts: int, ep_size: int, *, hidden: int, top_k: int) -> None:
    """Raise InvalidValue where DeepEP has no kernel for the layer."""
    multiple, largest = HIDDEN_IN_NODE if ep_size <= NODE_RANKS else HIDDEN_BETWEEN_NODES
    rules = {
        f"ep_size ({ep_size}) must be one of {', '.join(map(str, EP_SIZES))}": ep_size in EP_SIZES,
        f"num_experts ({num_experts}) must be a multiple of ep_size ({ep_size})": num_experts % ep_size == 0,
        f"num_experts ({num_experts}) must be at most {MAX_LOCAL_EXPERTS} a rank": (
            num_experts <= MAX_LOCAL_EXPERTS * ep_size
        ),
        f"top_k ({top_k}) must be at most {MAX_TOP_K}": top_k <= MAX_TOP_K,
        f"hidden ({hidden}) must be a multiple of {multiple} and at most {largest} with {ep_size} ranks": (
            hidden % multiple == 0 and hidden <= largest
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise InvalidValue(f"exchange 'deep_ep': {'; '.join(broken)}; change that, or take exchange 'auto'")


def open_buffer(ep_group: dist.ProcessGroup, hidden: int) -> Any:
    """The `deep_ep.Buffer` of this rank on the current CUDA device, for bf16 rows; one serves all layers of a model.

    Raises:
        InvalidValue: CUDA or the package is missing, or torch is set to fill uninitialised memory.

    Collective over `ep_group`, after the checks.
    """
    check_available()
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        raise InvalidValue(
            "exchange 'deep_ep' cannot work while deterministic algorithms fill uninitialised memory, which would "
            "overwrite rows that arrive; set torch.utils.deterministic.fill_uninitialized_memory = False"
        )
    buffers, ep_size, row_bytes = importlib.import_module("deep_ep").Buffer, dist.get_world_size(ep_group), 2 * hidden
    configs = buffers.get_dispatch_config(ep_size), buffers.get_combine_config(ep_size)
    return buffers(
        ep_group,
        max(config.get_nvl_buffer_size_hint(row_bytes, ep_size) for config in configs),
        max(config.get_rdma_buffer_size_hint(row_bytes, ep_size) for config in configs),
    )


@dataclass(frozen=True)
class DeepEPExchange:
    """Re-dispatches or combines with the cached handle of a chunk's first dispatch.

    handle: as `Buffer.dispatch` returned it. ids_QK: local expert ids, -1 where another rank has the expert; not to be
    read before the rows have arrived. counts_L: rows of each local expert. num_sent, num_received: rows that this rank
    sent to other ranks and received from them, int64 scalars on the device, for the meter.
    """

    buffer: Any
    handle: Any
    ids_QK: Tensor
    counts_L: list[int]
    num_sent: Tensor
    num_received: Tensor
    meter: Meter
    link: LinkKind

    @torch.no_grad()
    def dispatch(self, rows_TH: Tensor) -> list[Arriving]:
        """Start a dispatch with the cached handle: rows_QH. The sizes are known, so the host does not wait."""
        rows_TH = rows_TH.contiguous()
        rows_QH, *_, event = self.buffer.dispatch(rows_TH, handle=self.handle, async_finish=True)
        self.count_bytes(self.num_sent, rows_TH)
        return [(rows_QH, partial(_wait, event, (rows_TH,)))]

    @torch.no_grad()
    def combine(self, rows_QH: Tensor, weights_QK: Tensor | None = None) -> list[Arriving]:
        """Start a combine: the sum of each token's rows, y_TH; with weights also their sum for each token, (T, K)."""
        sent = tuple(tensor.contiguous() for tensor in (rows_QH, weights_QK) if tensor is not None)
        y_TH, sums_TK, event = self.buffer.combine(
            sent[0], self.handle, topk_weights=None if weights_QK is None else sent[1], async_finish=True
        )
        self.count_bytes(self.num_received, *sent)
        arriving: list[Arriving] = [(y_TH, partial(_wait, event, sent))]
        return arriving if weights_QK is None else [*arriving, (sums_TK, None)]

    def count_bytes(self, num_rows: Tensor, *tensors: Tensor) -> None:
        """Count `num_rows` rows of each of the tensors as bytes sent to other ranks."""
        row_bytes = sum(tensor.shape[1] * tensor.element_size() for tensor in tensors)
        self.meter.count_bytes(num_rows * row_bytes, self.link)


_Started = tuple[PendingRows, DeepEPExchange]


@dataclass
class DeepEPDispatcher(Dispatcher):
    """Sends one row for each (token, rank); DeepEP carries and sums the rows on a CUDA stream of its own.

    The host waits for the device once for each chunk, in `start_dispatch`, and nowhere else: DeepEP learns how many
    rows will arrive only when they leave, so that `plan` only cuts the batch. Backward does not wait, since it uses the
    cached handle. Rows must be bf16 and weights fp32.

    buffer: a `deep_ep.Buffer`; None opens one. All layers of a model share one dispatcher, and with it the buffer.

    Raises:
        InvalidValue: DeepEP has no kernel for these sizes, or cannot work here; before any communication.
    """

    num_experts: int
    ep_group: dist.ProcessGroup
    hidden: int
    top_k: int
    buffer: Any = None
    meter: Meter = field(default_factory=Meter)
    buffer_pool: BufferPool = field(default_factory=BufferPool)

    def __post_init__(self) -> None:
        ep_size = dist.get_world_size(self.ep_group)
        check_sizes(self.num_experts, ep_size, hidden=self.hidden, top_k=self.top_k)
        self.placement = ExpertPlacement(self.num_experts, ep_size)
        self.ep_rank = dist.get_rank(self.ep_group)
        self.link: LinkKind = "node" if ep_size <= NODE_RANKS else "network"
        if self.buffer is None:
            self.buffer = open_buffer(self.ep_group, self.hidden)

    def plan(self, topk_ids_TK: Tensor, num_chunks: int = 1) -> list[ChunkPlan]:
        """See `Dispatcher.plan`; it is not collective, waits for nothing and has no counts."""
        return [
            ChunkPlan(chunk_TK.contiguous(), [], layer=self.meter.tracker.layer)
            for chunk_TK in topk_ids_TK.tensor_split(num_chunks)
        ]

    def max_sizes(self, plans: list[ChunkPlan]) -> tuple[int, int, int]:
        """See `Dispatcher.max_sizes`. One reduction, of each chunk's rows by expert and tokens by rank."""
        # The sum over ranks gives each expert's rows. For the tokens each rank fills a column of its own, so that the
        # same sum gives the tokens of every rank, whose maximum is wanted.
        ep_size = self.placement.ep_size
        tokens = [[len(plan.topk_ids_TK) * (rank == self.ep_rank) for rank in range(ep_size)] for plan in plans]
        rows_CE = torch.stack([count_by_expert(plan.topk_ids_TK, self.num_experts) for plan in plans])
        sizes_CX = torch.cat([rows_CE, torch.tensor(tokens, device=rows_CE.device)], 1)
        self.meter.tracker.run(dist.all_reduce, sizes_CX, group=self.ep_group)
        rows_CP = sizes_CX[:, : self.num_experts].unflatten(1, (ep_size, -1)).sum(2)
        maxima = rows_CP.sum(0).max(), rows_CP.max(), sizes_CX[:, self.num_experts :].max()
        all_rows, rows, num_tokens = torch.stack(maxima).tolist()
        return all_rows, rows, num_tokens

    def start_dispatch(self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan) -> PendingDispatch[_Started]:
        """See `Dispatcher.start_dispatch`. Waits for the device, and for the other ranks, to learn the sizes.

        Raises:
            ValueError: also where rows are not bf16 or not `hidden` wide, or weights are not fp32.
        """
        check_shapes(x_TH, plan.topk_ids_TK, topk_weights_TK)
        if x_TH.shape[1] != self.hidden:
            raise ValueError(f"x has width {x_TH.shape[1]}, the dispatcher was made for hidden {self.hidden}")
        if (x_TH.dtype, topk_weights_TK.dtype) != (torch.bfloat16, torch.float32):
            raise ValueError(
                f"exchange 'deep_ep' takes bfloat16 rows and float32 weights, not {x_TH.dtype} and "
                f"{topk_weights_TK.dtype}; compute in bfloat16 (run.dtype), or take another exchange"
            )
        with self.meter.span("dispatch", x_TH.device):
            exchange, arriving = self._first_dispatch(x_TH, topk_weights_TK, plan)
        self.meter.count(routed=plan.topk_ids_TK.numel(), sent=plan.topk_ids_TK.numel())
        rows = PendingRows.start(
            x_TH,
            topk_weights_TK,
            span=partial(self.meter.span, "dispatch", x_TH.device),
            send=lambda *_: arriving,  # already sent by `_first_dispatch`, which alone learns the sizes
            receive=_unchanged,
            send_gradients=exchange.combine,
            receive_gradients=_unchanged,
        )
        return PendingDispatch(plan, (rows, exchange))

    @torch.no_grad()
    def _first_dispatch(
        self, x_TH: Tensor, topk_weights_TK: Tensor, plan: ChunkPlan
    ) -> tuple[DeepEPExchange, list[Arriving]]:
        sent = rows_TH, weights_TK, ids_TK = x_TH.contiguous(), topk_weights_TK.contiguous(), plan.topk_ids_TK
        per_rank_P, per_node, per_expert_E, is_in_rank_TP, _ = self.buffer.get_dispatch_layout(ids_TK, self.num_experts)
        # The host waits here: DeepEP spins until the device has written the counts of arriving rows into host memory.
        # `counts_L` and the sizes of the received tensors are made from them.
        rows_QH, ids_QK, weights_QK, counts_L, handle, event = self.buffer.dispatch(
            rows_TH,
            num_tokens_per_rank=per_rank_P,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank_TP,
            num_tokens_per_expert=per_expert_E,
            topk_idx=ids_TK,
            topk_weights=weights_TK,
            async_finish=True,
        )
        staying = per_rank_P[self.ep_rank].to(torch.int64)
        num_sent, num_received = per_rank_P.sum() - staying, len(rows_QH) - staying
        exchange = DeepEPExchange(self.buffer, handle, ids_QK, counts_L, num_sent, num_received, self.meter, self.link)
        exchange.count_bytes(num_sent, *sent)
        return exchange, [(rows_QH, partial(_wait, event, sent)), (weights_QK, None)]

    def finish_dispatch(self, pending: PendingDispatch[_Started]) -> tuple[Tensor, DispatchHandle[DeepEPExchange]]:
        """See `Dispatcher.finish_dispatch`."""
        rows, exchange = pending.state
        rows_QH, weights_QK = rows.finish()
        num_local = self.placement.num_local_experts[self.ep_rank]
        with self.meter.span("dispatch", rows_QH.device):
            # DeepEP marks the assignments of other ranks by -1; `order_by_expert` wants a larger id than all others.
            ids_QK = exchange.ids_QK.masked_fill(exchange.ids_QK < 0, num_local).to(torch.uint8)
            sources_R, weights_R = order_by_expert(ids_QK, weights_QK, sum(exchange.counts_L))
        self.meter.count(received=len(sources_R))
        return rows_QH, DispatchHandle(exchange.counts_L, sources_R, weights_R, len(rows_QH), exchange)

    def start_combine(self, sums_QH: Tensor, handle: DispatchHandle[DeepEPExchange]) -> PendingCombine[PendingRows]:
        """See `Dispatcher.start_combine`."""
        exchange = state_of_kind(handle, DeepEPExchange)
        self.meter.count(returned=len(handle.row_weights_R))
        return PendingCombine(
            PendingRows.start(
                sums_QH,
                span=partial(self.meter.span, "combine", sums_QH.device),
                send=exchange.combine,
                receive=_unchanged,
                send_gradients=exchange.dispatch,
                receive_gradients=_unchanged,
            )
        )

    def finish_combine(self, pending: PendingCombine[PendingRows]) -> Tensor:
        """See `Dispatcher.finish_combine`."""
        (y_TH,) = pending.state.finish()
        return y_TH


def _unchanged(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


def _wait(event: Any, _sent: tuple[Tensor, ...]) -> None:
    """Let the current stream wait for the event. The sent tensors are an argument only to stay alive until then."""
    event.current_stream_wait()


def _check(shape: ExchangeShape) -> None:
    if shape.payload != "compute":
        raise InvalidValue(
            f"payload {shape.payload!r} is not for exchange 'deep_ep', which sends bf16 rows; take 'compute'"
        )
    if shape.device == "cpu" or shape.dtype not in (None, "bfloat16"):
        raise InvalidValue(
            f"exchange 'deep_ep' sends bf16 rows between CUDA devices, but cluster.device is {shape.device} and "
            f"run.dtype {shape.dtype}; set --device cuda --run.dtype bfloat16, or take exchange 'auto'"
        )
    check_sizes(shape.num_experts, shape.ep_size, hidden=shape.hidden, top_k=shape.top_k)
    if shape.runs_here:
        check_available()


@register_backend("deep_ep", hops=one_row_a_rank, check=_check, automatic=False, replayable=False)
def _deep_ep(context: BackendContext) -> Dispatcher:
    shape = context.shape
    return DeepEPDispatcher(
        shape.num_experts,
        context.ep_group,
        shape.hidden,
        shape.top_k,
        meter=context.meter,
        buffer_pool=context.buffer_pool,
    )
