"""What a router counts beside the load, where a law asks for it: integers for each expert, summed like the load.

Shapes: T tokens (may be 0), E experts, K top-k, W integers an expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dispatch.routing.selection import count_by_expert

HISTOGRAM_BINS = 1000  # as in Kimi K3: a bin is about 0.002 to 0.003 of a score in [0, 1]


@dataclass(frozen=True)
class RouterChoice:
    """How one forward of a router chose.

    scores_TE: fp32, in [0, 1]. biased_TE: fp32, the values that experts were chosen by; -inf outside the groups of a
    token. topk_ids_TK: int64, best biased score first. expert_bias_E: fp32. scale: fp32 (), the law's STATISTIC_SCALE
    for this layer.
    """

    scores_TE: Tensor
    biased_TE: Tensor
    topk_ids_TK: Tensor
    expert_bias_E: Tensor
    scale: Tensor


class Statistic(Protocol):
    """Counts something in every training forward. It must not make the host wait for the device."""

    @property
    def width(self) -> int:
        """Integers that it counts per expert: W."""
        ...

    def count(self, routing: RouterChoice, counted_T: Tensor | None) -> Tensor:
        """Int64 (E, W) over the tokens where `counted_T` (bool, None for all) is True."""
        ...


class NearCutoff:
    """For each expert, the tokens whose choice would change if its biased score moved by less than `scale`.

    The distance is, for a chosen expert, to the best score left out; for an expert left out, to the worst chosen score.
    The count divided by 2 * scale estimates how many tokens the expert gains for each unit of bias.
    """

    width = 1

    def count(self, routing: RouterChoice, counted_T: Tensor | None) -> Tensor:
        chosen_TE = torch.zeros_like(routing.biased_TE, dtype=torch.bool).scatter_(1, routing.topk_ids_TK, True)
        worst_in_T1, best_out_T1 = _cutoffs(routing, chosen_TE)
        # Infinite for an expert outside the groups of a token, and for all chosen experts where none is left out.
        distance_TE = torch.where(chosen_TE, routing.biased_TE - best_out_T1, worst_in_T1 - routing.biased_TE)
        near_TE = distance_TE < routing.scale
        if counted_T is not None:
            near_TE &= counted_T.unsqueeze(1)
        return near_TE.sum(0, dtype=torch.int64).unsqueeze(1)


class CutoffHistogram:
    """For each expert, a histogram over tokens of the bias that lifts its score to the cutoff: cutoff - score.

    The cutoff of a token is the best biased score that was left out, for its chosen experts too. The range of the bins
    follows the bias, so that with scores in [0, 1] nothing falls outside of it (marin #7891): see `histogram_range`.
    """

    width = HISTOGRAM_BINS

    def count(self, routing: RouterChoice, counted_T: Tensor | None) -> Tensor:
        chosen_TE = torch.zeros_like(routing.biased_TE, dtype=torch.bool).scatter_(1, routing.topk_ids_TK, True)
        _, best_out_T1 = _cutoffs(routing, chosen_TE)
        low, high = histogram_range(routing.expert_bias_E)
        position_TE = (best_out_T1 - routing.scores_TE - low) * (self.width / (high - low))
        bins_TE = position_TE.clamp(0, self.width - 1).to(torch.int64)
        num_experts = routing.scores_TE.shape[1]
        # Bin b of expert e counts as id e * width + b, so that one scatter makes the histograms of all experts.
        bins_TE += torch.arange(num_experts, device=bins_TE.device) * self.width
        counted_TE = None if counted_T is None else counted_T.unsqueeze(1).expand_as(bins_TE)
        return count_by_expert(bins_TE, num_experts * self.width, counted_TE).view(num_experts, self.width)


def histogram_range(expert_bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Lower end of the first bin and upper end of the last one, in units of the bias: min - 1 and max + 1."""
    return expert_bias_E.min() - 1, expert_bias_E.max() + 1


STATISTICS: Mapping[str, Callable[[], Statistic]] = {"near_cutoff": NearCutoff, "cutoff_histogram": CutoffHistogram}


def make_statistic(name: str) -> Statistic:
    """The statistic of this name. Raises ValueError where there is none."""
    if name not in STATISTICS:
        raise ValueError(f"there is no statistic {name!r}; a law may ask for {', '.join(sorted(STATISTICS))}")
    return STATISTICS[name]()


def _cutoffs(routing: RouterChoice, chosen_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The worst biased score among the chosen and the best among the others, (T, 1) each."""
    worst_in_T1 = routing.biased_TE.gather(1, routing.topk_ids_TK[:, -1:])
    best_out_T1 = routing.biased_TE.masked_fill(chosen_TE, float("-inf")).amax(1, keepdim=True)
    return worst_in_T1, best_out_T1
