"""How balanced a load is. Plain functions of integer counts."""

import math

from torch import Tensor

from dispatch.layout import LoadLayout


def max_vio(load_E: Tensor) -> float:
    """How uneven a load is: max(load) / mean(load) - 1 (MaxVio; arXiv 2408.15664, equation 4).

    0 when all experts get equally many tokens, num_experts - 1 when one expert takes all, 0 for no load at all.

    Args:
        load_E: int64 (num_experts,), tokens of each expert of one layer. Waits for the device.

    Examples:
        >>> import torch
        >>> from dispatch import max_vio
        >>> max_vio(torch.tensor([10, 10, 10, 10]))
        0.0
        >>> max_vio(torch.tensor([20, 10, 10, 0]))
        1.0
    """
    total = int(load_E.sum())
    return int(load_E.max()) * load_E.numel() / total - 1 if total else 0.0


def max_vio_per_layer(load_N: Tensor, layout: LoadLayout) -> list[float]:
    """MaxVio of each MoE layer, from the load vector of all."""
    return [max_vio(load_N[experts]) for experts in layout.slices]


def max_vio_floor(num_tokens: int, num_experts: int, top_k: int) -> float:
    """MaxVio that independent, perfectly balanced routing would still show by chance on a batch of this size.

    sqrt(2 ln E) * sqrt((1 - k/E) / (T k/E)): the expected largest of E deviations of a multinomial draw. A measured
    value far below it means a counting bug.
    """
    if num_tokens < 1 or num_experts < 2:
        return 0.0
    share = top_k / num_experts
    return math.sqrt(2 * math.log(num_experts)) * math.sqrt((1 - share) / (num_tokens * share))


def num_dead_experts(load_N: Tensor) -> int:
    """Experts, over all layers, that no token chose."""
    return int((load_N == 0).sum())
