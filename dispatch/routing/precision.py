"""A module whose tensors stay wide, whatever the model is cast to."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class KeepsWide(nn.Module):
    """Moves and casts like any module, but stores none of the tensors that it names below fp32.

    at_least_fp32: names of those that are float64 in a float64 model. always_fp32: of those that never are.
    """

    at_least_fp32: ClassVar[tuple[str, ...]] = ()
    always_fp32: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        names = (*self.at_least_fp32, *self.always_fp32)
        kept = {name: tensor.detach() for name in names if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now: Any = getattr(self, name)
            wanted = torch.promote_types(now.dtype, torch.float32) if name in self.at_least_fp32 else torch.float32
            if now.dtype != wanted:
                # From the value before the cast: bf16 and back would lose steps of 0.001 once the bias reaches 0.5.
                now.data = before.to(now.device, wanted)
        return self
