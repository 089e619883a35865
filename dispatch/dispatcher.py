"""Dispatchers: how each token's row reaches its experts and how the results come back.

Shapes: T tokens on this rank (may be 0, may differ by rank), K top-k, A = T * K assignments, H hidden, E experts,
L experts of this rank, P EP ranks, R rows received (may be 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.exchange import AllToAll, CopyToAssignments, Reorder, SumAssignments
from dispatch.meter import Meter
from dispatch.placement import ExpertPlacement


@dataclass(frozen=True)
class DispatchHandle:
    """All that the experts, `combine` and backward need of one dispatch.

    tokens_per_local_expert_L: rows of each local expert, in the order of the rows; sums to R.
    row_weights_R: the combine weight of each row, with its gradient; the experts apply it.
    token_of_row_A, rows_of_token_TK: which token each outgoing row copies, and the inverse.
    input_splits, output_splits: rows sent to and received from each EP rank; None where nothing travels.
    to_expert_order_R, to_source_order_R: permutations between arrival order and expert order; None where nothing
    travels.
    """

    tokens_per_local_expert_L: list[int]
    row_weights_R: Tensor
    token_of_row_A: Tensor
    rows_of_token_TK: Tensor
    input_splits: list[int] | None = None
    output_splits: list[int] | None = None
    to_expert_order_R: Tensor | None = None
    to_source_order_R: Tensor | None = None


class Dispatcher(Protocol):
    """One exchange. Implementations hold no state of a step: two dispatches may be in flight."""

    placement: ExpertPlacement
    ep_rank: int
    meter: Meter

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        """Bring each token's row to its experts.

        Args:
            x_TH: float rows. T may differ between ranks and may be 0.
            topk_ids_TK: int64 in [0, num_experts), K different experts a token.
            topk_weights_TK: float combine weights; they need not sum to 1.
        Returns:
            rows_RH in order of local expert, and the handle for the experts and `combine`.
        Raises:
            ValueError: the shapes of x, ids and weights do not fit.

        Collective over the EP group, in backward too. Waits for the device once, to learn the split sizes.
        """
        ...

    def combine(self, rows_RH: Tensor, handle: DispatchHandle) -> Tensor:
        """Bring the experts' weighted rows back and sum them per token: y_TH. Collective over the EP group."""
        ...


@dataclass
class LocalDispatcher:
    """All experts on this rank: a permutation, nothing travels."""

    num_experts: int
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement(self.num_experts, ep_size=1)
        self.ep_rank = 0

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        """See `Dispatcher.dispatch`; not collective."""
        _check(x_TH, topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            rows_AH, weights_A, counts_E, token_of_row_A, rows_of_token_TK = _permute(
                x_TH, topk_ids_TK, topk_weights_TK, self.num_experts
            )
        self.meter.count(routed=topk_ids_TK.numel(), sent=len(rows_AH), received=len(rows_AH))
        return rows_AH, DispatchHandle(counts_E.tolist(), weights_A, token_of_row_A, rows_of_token_TK)

    def combine(self, rows_RH: Tensor, handle: DispatchHandle) -> Tensor:
        """See `Dispatcher.combine`; not collective."""
        self.meter.count(returned=len(rows_RH))
        with self.meter.span("combine", rows_RH.device):
            return _sum_rows_of_tokens(rows_RH, handle)


@dataclass
class AllToAllDispatcher:
    """One copy of a token for each (token, expert), by all-to-all over the EP group (NCCL or gloo, the same code).

    Order of the wire: per-expert counts first, since receivers must size their buffers; then weights; then rows.
    """

    num_experts: int
    ep_group: dist.ProcessGroup
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement(self.num_experts, dist.get_world_size(self.ep_group))
        self.ep_rank = dist.get_rank(self.ep_group)

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        """See `Dispatcher.dispatch`."""
        _check(x_TH, topk_ids_TK, topk_weights_TK)
        with self.meter.span("dispatch", x_TH.device):
            rows_AH, weights_A, counts_E, token_of_row_A, rows_of_token_TK = _permute(
                x_TH, topk_ids_TK, topk_weights_TK, self.num_experts
            )
            input_splits, received_PL = self._exchange_counts(counts_E)
            output_splits = [sum(row) for row in received_PL]
            travel = (input_splits, output_splits, self.ep_group, self.meter, "dispatch")
            order_R, inverse_R = _expert_order(received_PL, x_TH.device)
            weights_R = Reorder.apply(AllToAll.apply(weights_A, *travel), order_R, inverse_R)
            rows_RH = Reorder.apply(AllToAll.apply(rows_AH, *travel), order_R, inverse_R)
        self.meter.count(routed=topk_ids_TK.numel(), sent=len(rows_AH), received=len(rows_RH))
        handle = DispatchHandle(
            tokens_per_local_expert_L=[sum(column) for column in zip(*received_PL, strict=True)],
            row_weights_R=weights_R,
            token_of_row_A=token_of_row_A,
            rows_of_token_TK=rows_of_token_TK,
            input_splits=input_splits,
            output_splits=output_splits,
            to_expert_order_R=order_R,
            to_source_order_R=inverse_R,
        )
        return rows_RH, handle

    def combine(self, rows_RH: Tensor, handle: DispatchHandle) -> Tensor:
        """See `Dispatcher.combine`."""
        with self.meter.span("combine", rows_RH.device):
            arrived_RH = Reorder.apply(rows_RH, handle.to_source_order_R, handle.to_expert_order_R)
            rows_AH = AllToAll.apply(
                arrived_RH, handle.output_splits, handle.input_splits, self.ep_group, self.meter, "combine"
            )
            self.meter.count(returned=len(rows_AH))
            return _sum_rows_of_tokens(rows_AH, handle)

    def _exchange_counts(self, counts_E: Tensor) -> tuple[list[int], list[list[int]]]:
        """Tell each rank how many rows come for its experts. Returns rows sent to each rank, and received (P, L)."""
        sizes = self.placement.num_local_experts
        num_local, ep_size = sizes[self.ep_rank], self.placement.ep_size
        received = counts_E.new_empty(ep_size * num_local)
        dist.all_to_all_single(received, counts_E, [num_local] * ep_size, list(sizes), group=self.ep_group)
        # The one host synchronisation of the layer: the backend takes split sizes as host integers.
        host = torch.cat([counts_E, received]).tolist()
        owned = [self.placement.owned_by(rank) for rank in range(ep_size)]
        sent, got = host[: self.num_experts], host[self.num_experts :]
        return [sum(sent[ids.start : ids.stop]) for ids in owned], [
            got[rank * num_local : (rank + 1) * num_local] for rank in range(ep_size)
        ]


def _permute(
    x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Order assignments by expert, ties by token: rows_AH, weights_A, counts_E, token_of_row_A, rows_of_token_TK."""
    num_tokens, top_k = topk_ids_TK.shape
    ids_A = topk_ids_TK.flatten()
    # A narrow integer sorts by radix on CPU, three times faster than int64.
    narrow = torch.uint8 if num_experts <= 256 else torch.int16
    order_A = ids_A.to(narrow).argsort(stable=True)
    rows_of_assignment_A = torch.empty_like(order_A).scatter_(
        0, order_A, torch.arange(len(order_A), device=x_TH.device)
    )
    counts_E = ids_A.new_zeros(num_experts).scatter_add_(0, ids_A, torch.ones_like(ids_A))
    token_of_row_A, rows_of_token_TK = order_A // top_k, rows_of_assignment_A.view(num_tokens, top_k)
    rows_AH = CopyToAssignments.apply(x_TH, token_of_row_A, rows_of_token_TK)
    weights_A = Reorder.apply(topk_weights_TK.flatten(), order_A, rows_of_assignment_A)
    return rows_AH, weights_A, counts_E, token_of_row_A, rows_of_token_TK


def _sum_rows_of_tokens(rows_AH: Tensor, handle: DispatchHandle) -> Tensor:
    y_TH: Tensor = SumAssignments.apply(rows_AH, handle.token_of_row_A, handle.rows_of_token_TK)
    return y_TH


def _expert_order(received_PL: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Permutation from arrival order (rank, expert) to expert order (expert, rank), and its inverse.

    P=2, L=2, counts [[2, 1], [1, 1]]:  arrival  r0e0 r0e0 r0e1 r1e0 r1e1  ->  order 0 1 3 2 4
    """
    counts_PL = torch.tensor(received_PL, dtype=torch.int64).reshape(len(received_PL), -1)
    lengths_N = counts_PL.t().flatten()
    starts_N = (counts_PL.flatten().cumsum(0) - counts_PL.flatten()).view_as(counts_PL).t().flatten()
    shift_N = starts_N - (lengths_N.cumsum(0) - lengths_N)
    order_R = torch.arange(int(counts_PL.sum())) + shift_N.repeat_interleave(lengths_N)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R)))
    return order_R.to(device, non_blocking=True), inverse_R.to(device, non_blocking=True)


def _check(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
    if topk_ids_TK.shape != topk_weights_TK.shape or x_TH.dim() != 2 or len(x_TH) != len(topk_ids_TK):
        raise ValueError(
            f"x {tuple(x_TH.shape)}, topk_ids {tuple(topk_ids_TK.shape)} and topk_weights "
            f"{tuple(topk_weights_TK.shape)} must be (T, hidden), (T, top_k) and (T, top_k)"
        )
