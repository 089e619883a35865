"""An exchange group that sends a row for each assignment, a (token, expert) pair, as Megatron's all-to-all does.

Shapes: as in `dispatch.exchange.exchange_group`, with one id a row (W = 1); A = T K assignments, each a row (S = A).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatch.exchange.exchange_group import ExchangeGroup
from dispatch.exchange.payload import Payload
from dispatch.exchange.row_map import RowMap
from dispatch.exchange.token_exchange import TokenExchange


@dataclass(frozen=True)
class AssignmentGroup(ExchangeGroup):
    """Sends a row for each (token, expert), with one id and one weight.

    It sends less than `ExchangeGroup` where nearly all experts of a token are on different ranks: both then send about
    as many rows, but a row of `ExchangeGroup` carries the ids and weights of all K experts. No id may be blank.
    """

    def count(self, chunks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See `ExchangeGroup.count`."""
        _, counts_CE = super().count(chunks)
        return torch.stack([part.sum(1) for part in counts_CE.split(self.num_experts_P, 1)], 1), counts_CE

    def exchange(
        self, ids_TK: Tensor, input_splits: list[int], output_splits: list[int], payload: Payload, layer: str
    ) -> TokenExchange:
        """See `ExchangeGroup.exchange`."""
        sizes = self.split_sizes(input_splits, output_splits, layer)
        top_k, num_experts = ids_TK.shape[1], sum(self.num_experts_P)
        start = sum(self.num_experts_P[: self.rank])
        is_own = (ids_TK >= start) & (ids_TK < start + self.num_experts_P[self.rank])
        # By expert, and so by rank; the rows of this rank's own experts last, as `SplitSizes` wants it.
        order_A = (ids_TK + num_experts * is_own).flatten().to(torch.int32).argsort(stable=True)
        slots = RowMap(order_A, _inverse(order_A), torch.arange(len(order_A), device=ids_TK.device))
        first_T = torch.arange(len(ids_TK), device=ids_TK.device) * top_k
        rows = RowMap(order_A // top_k, slots.copies_by_source_A, first_T)
        ids_S1 = ids_TK.flatten()[order_A].unsqueeze(1)
        ids_S1 = self.ids_for_receiver(ids_S1, self.owners(ids_S1).squeeze(1))
        return TokenExchange(rows, slots, ids_S1, sizes, payload)


def _inverse(order_A: Tensor) -> Tensor:
    """The permutation that undoes `order_A`."""
    return torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
