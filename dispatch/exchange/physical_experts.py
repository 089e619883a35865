"""Where the assignments of a rank are computed, where hot experts have copies.

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
    """What a dispatcher whose rows travel by the ids of physical experts has (`ExpertCopies`).

    copies: of hot experts; None where each is on one rank.
    """

    copies: ExpertCopies | None = field(default=None, kw_only=True)
    placement: ExpertPlacement = field(init=False)
    ep_rank: int = field(init=False)

    def with_copies(self, copies: ExpertCopies) -> Self:
        """The same where hot experts have copies; all ranks take the same ones at the same time."""
        other = replace(self, copies=copies)
        other.exchange, other.top_k = self.exchange, self.top_k  # type: ignore[attr-defined]
        return other

    @property
    def num_physical_P(self) -> tuple[int, ...]:  # noqa: N802 - the shape is part of the name
        """Experts that each rank computes, copies among them."""
        return self.placement.num_local_experts if self.copies is None else self.copies.num_physical

    def physical_ids(self, topk_ids_TK: Tensor) -> Tensor:
        """Where each assignment is computed: the expert's id, unless there are copies."""
        if self.copies is None:
            return topk_ids_TK
        device = topk_ids_TK.device
        table_GE = self._physical_GE = self._physical_GE.to(device)
        share_T = torch.arange(len(topk_ids_TK), device=device) % len(table_GE)
        return table_GE.flatten()[share_T.unsqueeze(1) * table_GE.shape[1] + topk_ids_TK]

    @cached_property
    def _physical_GE(self) -> Tensor:  # noqa: N802 - the shape is part of the name
        if self.copies is None:
            raise RuntimeError("without copies an expert's id is its place")
        return torch.tensor(self.copies.physical_ids(self.ep_rank))
