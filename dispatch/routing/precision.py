"""A module that keeps some of its tensors in fp32 or wider, whatever dtype the model is cast to."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class KeepsWide(nn.Module):
    """A module whose named tensors never become narrower than fp32 by `to`, `half`, `bfloat16` and the like.

    at_least_fp32: names of tensors that are fp32, or float64 in a float64 model. always_fp32: names of tensors that are
    fp32 in every model.
    """

    at_least_fp32: ClassVar[tuple[str, ...]] = ()
    always_fp32: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to` calls this method of each submodule, and no public one.
        names = (*self.at_least_fp32, *self.always_fp32)
        kept = {name: tensor.detach() for name in names if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now: Any = getattr(self, name)
            wanted = torch.promote_types(now.dtype, torch.float32) if name in self.at_least_fp32 else torch.float32
            if now.dtype != wanted:
                # From the value before the cast: bf16 numbers near 0.5 are 0.004 apart, and a law's steps are 0.001.
                now.data = before.to(now.device, wanted)
        return self
