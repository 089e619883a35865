"""Which rank computes each assignment, where hot experts have copies on other ranks.

Shapes: T tokens of this rank, K top-k, E experts, P ranks, G shares of the tokens of an expert.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from dispatch.exchange.expert_copies import ExpertCopies
from dispatch.exchange.placement import ExpertPlacement


@dataclass
class PhysicalExperts:
    """The part of a dispatcher that turns expert ids into ids of physical experts, by which its rows travel.

    copies: the copies of hot experts; None where each expert is on one rank. Physical experts: see `ExpertCopies`.
    """

    copies: ExpertCopies | None = field(default=None, kw_only=True)
    placement: ExpertPlacement = field(init=False)
    ep_rank: int = field(init=False)

    def with_copies(self, copies: ExpertCopies) -> Self:
        """The same dispatcher with these copies. All ranks must change to the same copies at the same time."""
        other = replace(self, copies=copies)
        other.exchange, other.top_k = self.exchange, self.top_k  # type: ignore[attr-defined]
        return other

    @property
    def num_physical_P(self) -> tuple[int, ...]:  # noqa: N802 - the shape is part of the name
        """Experts that each rank computes, copies among them."""
        return self.placement.num_local_experts if self.copies is None else self.copies.num_physical

    def physical_ids(self, topk_ids_TK: Tensor) -> Tensor:
        """The physical expert that computes each assignment, int64 (T, K): the expert itself, unless it has copies."""
        if self._physical_GE is None:
            return topk_ids_TK
        # Kept on the device: a copy to it in every step would make the host wait.
        table_GE = self._physical_GE = self._physical_GE.to(topk_ids_TK.device)
        share_T = torch.arange(len(topk_ids_TK), device=topk_ids_TK.device) % len(table_GE)
        return table_GE[share_T.unsqueeze(1), topk_ids_TK]

    @cached_property
    def _physical_GE(self) -> Tensor | None:  # noqa: N802 - the shape is part of the name
        return None if self.copies is None else torch.tensor(self.copies.physical_ids(self.ep_rank))
