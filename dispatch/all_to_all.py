"""The two exchanges between EP ranks: a row for each assignment, or one for each rank that a token needs.

Both work on any backend of torch.distributed (NCCL and gloo, the same code) and take their sizes in one message first:
receivers must size their buffers before any row is on the wire.

Shapes: T tokens on this rank (may be 0, may differ by rank), K top-k, A = T * K assignments, H hidden, E experts,
L experts of this rank, P EP ranks, S rows that leave this rank, Q rows that arrive, R rows of the local experts.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.dispatcher import (
    Dispatcher,
    DispatchHandle,
    LocalDispatcher,
    check_shapes,
    inverse,
    order_by_expert,
    token_map,
)
from dispatch.exchange import Route
from dispatch.meter import Meter
from dispatch.placement import ExpertPlacement
from dispatch.row_map import RowMap
from dispatch.selection import count_by_expert

Exchange = Literal["auto", "assignment", "rank"]


@dataclass
class _AcrossRanks:
    """What both exchanges share."""

    num_experts: int
    ep_group: dist.ProcessGroup
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement(self.num_experts, dist.get_world_size(self.ep_group))
        self.ep_rank = dist.get_rank(self.ep_group)

    def combine(self, sums_QH: Tensor, handle: DispatchHandle) -> Tensor:
        """See `Dispatcher.combine`."""
        if handle.route is None or handle.outgoing is None:
            raise ValueError("this handle is of a LocalDispatcher; combine with the dispatcher that dispatched")
        self.meter.count(returned=len(handle.row_weights_R))
        with self.meter.span("combine", sums_QH.device):
            return handle.outgoing.sum(handle.route.back().exchange(sums_QH, "combine"))

    def _exchange_sizes(self, counts_E: Tensor, rows_P: Tensor) -> tuple[Route, list[list[int]]]:
        """Tell each rank how many rows come, and how many assignments of each of its experts they stand for.

        Returns the route of the rows, and the assignments received by rank and local expert (P, L).
        """
        sizes, ep_size = self.placement.num_local_experts, self.placement.ep_size
        message = torch.cat(
            [part for p, counts in enumerate(counts_E.split(sizes)) for part in (rows_P[p : p + 1], counts)]
        )
        num_mine = 1 + sizes[self.ep_rank]
        received = message.new_empty(ep_size * num_mine)
        dist.all_to_all_single(
            received, message, [num_mine] * ep_size, [1 + size for size in sizes], group=self.ep_group
        )
        # The one host synchronisation of the layer: the backend takes split sizes as host integers.
        host = torch.cat([rows_P, received]).tolist()
        by_rank = [host[start : start + num_mine] for start in range(ep_size, len(host), num_mine)]
        route = Route(host[:ep_size], [row[0] for row in by_rank], self.ep_group, self.meter)
        return route, [row[1:] for row in by_rank]


@dataclass
class AllToAllDispatcher(_AcrossRanks):
    """One row for each (token, expert): the usual exchange, best where a token's experts are all on different ranks."""

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        """See `Dispatcher.dispatch`. On the wire: sizes, weights, rows."""
        check_shapes(x_TH, topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            counts_E = count_by_expert(topk_ids_TK, self.num_experts)
            order_A = order_by_expert(topk_ids_TK.flatten(), self.num_experts)
            outgoing = token_map(order_A, topk_ids_TK.shape)
            rows_P = torch.stack([counts.sum() for counts in counts_E.split(self.placement.num_local_experts)])
            route, received_PL = self._exchange_sizes(counts_E, rows_P)
            order_R = _expert_order(received_PL).to(x_TH.device, non_blocking=True)
            expert_rows = RowMap(order_R, inverse(order_R), torch.arange(len(order_R), device=x_TH.device))
            weights_A = topk_weights_TK.flatten().gather(0, order_A)
            weights_R = route.exchange(weights_A, "dispatch").gather(0, order_R)
            arrived_QH = route.exchange(outgoing.copy(x_TH), "dispatch")
        self.meter.count(routed=topk_ids_TK.numel(), sent=len(order_A), received=len(arrived_QH))
        tokens_per_local_expert_L = [sum(column) for column in zip(*received_PL, strict=True)]
        return arrived_QH, DispatchHandle(tokens_per_local_expert_L, expert_rows, weights_R, outgoing, route)


@dataclass
class OncePerRankDispatcher(_AcrossRanks):
    """One row for each (token, rank): copied to its experts where it arrives, and one partial sum comes back.

    At top-8 over 2 ranks a quarter of the rows of the other exchange, and a quarter of the gradients. The idea is
    DeepEP's (node-limited dispatch of arXiv 2412.19437, section 3.2.2), here in plain torch. In bf16 a partial sum is
    rounded once more before it comes back.
    """

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        """See `Dispatcher.dispatch`. On the wire: sizes, local expert ids, weights, rows."""
        check_shapes(x_TH, topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            rank_TK = self._rank_of_expert(x_TH.device)[topk_ids_TK]
            needs_PT = _needs(rank_TK, self.placement.ep_size)
            counts_E = count_by_expert(topk_ids_TK, self.num_experts)
            route, received_PL = self._exchange_sizes(counts_E, needs_PT.sum(1))
            outgoing, rank_S = _crossing(needs_PT, sum(route.input_splits))
            local_ids_QK = route.exchange_plain(self._local_ids(outgoing, rank_S, rank_TK, topk_ids_TK))
            weights_QK = route.exchange(outgoing.copy(topk_weights_TK), "dispatch")
            tokens_per_local_expert_L = [sum(column) for column in zip(*received_PL, strict=True)]
            num_rows = sum(tokens_per_local_expert_L)
            order_R, expert_rows = _fan_out(local_ids_QK, num_rows, no_expert=self._no_expert)
            arrived_QH = route.exchange(outgoing.copy(x_TH), "dispatch")
            weights_R = weights_QK.flatten().gather(0, order_R)
        self.meter.count(routed=topk_ids_TK.numel(), sent=topk_ids_TK.numel(), received=num_rows)
        return arrived_QH, DispatchHandle(tokens_per_local_expert_L, expert_rows, weights_R, outgoing, route)

    @property
    def _no_expert(self) -> int:
        """A local id that no rank has, for the assignments of a token that go to another rank."""
        return max(self.placement.num_local_experts)

    def _rank_of_expert(self, device: torch.device) -> Tensor:
        sizes = torch.tensor(self.placement.num_local_experts)
        return torch.arange(len(sizes)).repeat_interleave(sizes).to(device, non_blocking=True)

    def _local_ids(self, outgoing: RowMap, rank_S: Tensor, rank_TK: Tensor, topk_ids_TK: Tensor) -> Tensor:
        """Local expert ids of each row that leaves, (S, K), blank where the assignment is another rank's."""
        token_S = outgoing.source_of_copy_A
        is_mine_SK = rank_TK[token_S] == rank_S.unsqueeze(1)
        first_P = torch.tensor([self.placement.owned_by(p).start for p in range(self.placement.ep_size)])
        local_ids_SK = topk_ids_TK[token_S] - first_P.to(rank_S.device, non_blocking=True)[rank_S].unsqueeze(1)
        wire_dtype = torch.uint8 if self._no_expert < 256 else torch.int32
        return local_ids_SK.masked_fill(~is_mine_SK, self._no_expert).to(wire_dtype)


def make_dispatcher(
    num_experts: int,
    ep_group: dist.ProcessGroup,
    *,
    hidden: int,
    top_k: int,
    exchange: Exchange = "auto",
    meter: Meter | None = None,
) -> Dispatcher:
    """The dispatcher for this EP group: `auto` takes the exchange that puts fewer bytes on the wire."""
    meter = meter or Meter()
    ep_size = dist.get_world_size(ep_group)
    if ep_size == 1:
        return LocalDispatcher(num_experts, meter)
    if exchange == "auto":
        # In words of a row; a row for a rank carries top_k weights and ids, one for an assignment a weight.
        words_by_rank = ranks_per_token(num_experts, ep_size, top_k) * (hidden + 2 * top_k)
        exchange = "rank" if words_by_rank < top_k * (hidden + 1) else "assignment"
    kind = OncePerRankDispatcher if exchange == "rank" else AllToAllDispatcher
    return kind(num_experts, ep_group, meter)


def ranks_per_token(num_experts: int, ep_size: int, top_k: int) -> float:
    """Ranks that a token needs on average when its experts are a random choice, as under a balanced load nearly."""
    missed = (
        math.comb(num_experts - size, top_k) / math.comb(num_experts, top_k)
        for size in ExpertPlacement(num_experts, ep_size).num_local_experts
    )
    return sum(1 - share for share in missed)


def _needs(rank_TK: Tensor, ep_size: int) -> Tensor:
    needs_TP = torch.zeros(len(rank_TK), ep_size, dtype=torch.bool, device=rank_TK.device)
    return needs_TP.scatter_(1, rank_TK, True).t()


def _crossing(needs_PT: Tensor, num_rows: int) -> tuple[RowMap, Tensor]:
    """The map from tokens to the rows that leave, ordered by rank then token, and the rank of each row.

    needs [[1, 0, 1], [1, 1, 0]] (2 ranks, 3 tokens):  rows of tokens 0 2 | 0 1,  token 0 is copied to rows 0 and 2
    """
    num_tokens = needs_PT.shape[1]
    # The number of rows is known on the host already: nonzero() would wait for the device a second time.
    places_S = torch.nonzero_static(needs_PT.flatten(), size=num_rows).squeeze(1)
    token_S, rank_S = places_S % max(num_tokens, 1), places_S // max(num_tokens, 1)
    copies_T = needs_PT.sum(0)
    return RowMap(token_S, token_S.argsort(stable=True), copies_T.cumsum(0) - copies_T), rank_S


def _fan_out(local_ids_QK: Tensor, num_rows: int, *, no_expert: int) -> tuple[Tensor, RowMap]:
    """Places in local_ids_QK by expert, blanks left out, and the map from arrived rows to expert rows."""
    top_k = local_ids_QK.shape[1]
    is_real_QK = local_ids_QK != no_expert
    # Blanks have the largest id, so they sort behind all rows that there are.
    order_R = local_ids_QK.flatten().argsort(stable=True)[:num_rows]
    row_of_place = torch.zeros(local_ids_QK.numel(), dtype=torch.int64, device=order_R.device)
    row_of_place.scatter_(0, order_R, torch.arange(num_rows, device=order_R.device))
    real_places_R = torch.nonzero_static(is_real_QK.flatten(), size=num_rows).squeeze(1)
    copies_Q = is_real_QK.sum(1)
    return order_R, RowMap(order_R // top_k, row_of_place[real_places_R], copies_Q.cumsum(0) - copies_Q)


def _expert_order(received_PL: list[list[int]]) -> Tensor:
    """Permutation from arrival order (rank, expert) to expert order (expert, rank), on the CPU.

    P=2, L=2, counts [[2, 1], [1, 1]]:  arrival  r0e0 r0e0 r0e1 r1e0 r1e1  ->  order 0 1 3 2 4
    """
    counts_PL = torch.tensor(received_PL, dtype=torch.int64).reshape(len(received_PL), -1)
    lengths = counts_PL.t().flatten()
    starts = (counts_PL.flatten().cumsum(0) - counts_PL.flatten()).view_as(counts_PL).t().flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(counts_PL.sum())) + shift.repeat_interleave(lengths)
