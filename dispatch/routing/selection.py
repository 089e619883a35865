"""Choosing experts: top-k of score + bias, optionally limited to the best groups; and counting what was chosen.

No gradients pass the choice.

Shapes: T tokens (may be 0), E experts, K top-k, G groups.
"""

from typing import Any

import torch
from torch import Tensor


def biased_scores(
    scores_TE: Tensor,
    expert_bias_E: Tensor,
    *,
    num_groups: int = 1,
    groups_kept: int = 1,
    scores_per_group: int = 2,
    multiplies: bool = False,
) -> Tensor:
    """The values that experts are chosen by, fp32 (T, E): score + bias, and -inf outside the groups a token may use.

    With num_groups > 1 the experts lie in equal contiguous groups; a group's score is the sum of its `scores_per_group`
    highest biased scores, and only experts of the `groups_kept` best groups can be chosen (arXiv 2412.19437, section
    2.1.2, where scores_per_group is top_k / groups_kept; DeepSeek's inference code fixes it at 2).

    Args:
        scores_TE: any float dtype.
        expert_bias_E: fp32.
        multiplies: take score * (1 + bias) instead of the sum (arXiv 2408.15664, table 4).
    """
    scores_TE = scores_TE.detach().float()
    biased_TE = scores_TE * (1 + expert_bias_E) if multiplies else scores_TE + expert_bias_E
    return _mask_groups(biased_TE, num_groups, groups_kept, scores_per_group) if num_groups > 1 else biased_TE


def ordered_topk(values_TE: Tensor, k: int) -> Tensor:
    """Indices of the k largest fp32 values of each row, int64 (T, k), largest first, ties to the lowest index.

    torch.topk leaves the order of equal values open, and it differs between devices. Here the value (high 32 bits) and
    the index (low 32 bits) are packed into one int64 key, so that no two keys are equal; it costs less than a stable
    sort.
    """
    # Adding 0.0 turns -0.0 into 0.0. The bits of negative floats, as integers, sort in the wrong order; the xor of all
    # but the sign bit turns it round.
    bits_TE = (values_TE.float() + 0.0).view(torch.int32)
    ordered_TE = (bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = values_TE.shape[-1] - 1
    keys_TE = (ordered_TE << 32) + torch.arange(last, -1, -1, device=values_TE.device)
    best_TK: Tensor = keys_TE.topk(k, dim=-1).values
    return last - (best_TK & 0xFFFFFFFF)


def count_by_expert(expert_ids: Tensor, num_experts: int, counted: Tensor | None = None) -> Tensor:
    """How often each expert occurs, int64 (E,). counted: bool of the same shape, False where an id does not count.

    torch.bincount would do, but on CUDA it makes the host wait for the device. Integers give the same sum in any order.
    """
    ones = torch.ones_like(expert_ids) if counted is None else counted.to(torch.int64)
    zeros_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    return zeros_E.scatter_add_(0, expert_ids.flatten(), ones.flatten())


class CountInBackward(torch.autograd.Function):
    """The identity; its backward, if it runs, adds each count to its total. counts: pairs of (total, count)."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, counts: list[tuple[Tensor, Tensor]]) -> Tensor:
        # A plain attribute: torch.utils.checkpoint refuses a recompute that saves more tensors than its forward did.
        ctx.counts = counts
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:
        for total, count in ctx.counts:
            total.add_(count)
        return grad_TK, None


def _mask_groups(biased_TE: Tensor, num_groups: int, groups_kept: int, scores_per_group: int) -> Tensor:
    grouped_TGE = biased_TE.unflatten(-1, (num_groups, -1))
    group_scores_TG = grouped_TGE.topk(scores_per_group, dim=-1).values.sum(-1)  # values: ties do not matter here
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    kept_TG.scatter_(1, ordered_topk(group_scores_TG, groups_kept), True)
    # -inf, not 0: with negative biased scores a zero would win (DeepSeek-V3 #741, vLLM #13474).
    limited_TE: Tensor = grouped_TGE.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    return limited_TE
