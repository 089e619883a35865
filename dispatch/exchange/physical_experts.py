"""Which rank computes each assignment, where hot experts have copies on other ranks.

Shapes: T tokens of this rank, K top-k, E experts, P ranks, G shares of each rank's tokens (see `expert_copies`).
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
    """Base class of dispatchers that can send an assignment to a copy of its expert instead of the owner.

    A physical expert is an expert or a copy of one; `ExpertCopies.num_physical` says how they are numbered.

    copies: the copies of hot experts; None where no expert has one. exchange, top_k: see `Dispatcher`.
    """

    copies: ExpertCopies | None = field(default=None, kw_only=True)
    exchange: str = field(default="none", kw_only=True)
    top_k: int | None = field(default=None, kw_only=True)
    placement: ExpertPlacement = field(init=False)
    ep_rank: int = field(init=False)

    def with_copies(self, copies: ExpertCopies) -> Self:
        """A new dispatcher with these copies and all else as here. All ranks must change to it at the same step."""
        return replace(self, copies=copies)

    @property
    def num_physical_P(self) -> tuple[int, ...]:  # noqa: N802 - the shape is part of the name
        """The number of physical experts of each rank."""
        return self.placement.num_local_experts if self.copies is None else self.copies.num_physical

    def physical_ids(self, topk_ids_TK: Tensor) -> Tensor:
        """The physical expert that computes each assignment, int64 (T, K). Without copies these are the expert ids."""
        if self._physical_GE is None:
            return topk_ids_TK
        # The table stays on the device: copying it there in every step would make the host wait.
        table_GE = self._physical_GE = self._physical_GE.to(topk_ids_TK.device)
        share_T = torch.arange(len(topk_ids_TK), device=topk_ids_TK.device) % len(table_GE)
        return table_GE[share_T.unsqueeze(1), topk_ids_TK]

    @cached_property
    def _physical_GE(self) -> Tensor | None:  # noqa: N802 - the shape is part of the name
        return None if self.copies is None else torch.tensor(self.copies.physical_ids(self.ep_rank))
