"""Losses from whole logits: the slow, obvious reference of workers.model.loss."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["token_nll", "token_nll_sum"]


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood of each target in nats, shaped like targets; 0 where a target is -100."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


def token_nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of `token_nll`, a scalar."""
    return token_nll(logits, targets).sum()
