"""Hears in which order a layer does its work."""

from typing import Any

from torch import Tensor

from dispatch.layer import MoELayer


def hear_experts(layer: MoELayer, events: list[str]) -> None:
    """Add "e" to `events` where the experts begin with the rows of a chunk, and "E" where their backward does."""
    compute = layer.experts.compute

    def heard(*args: Any, **kwargs: Any) -> Tensor:
        events.append("e")
        sums = compute(*args, **kwargs)
        sums.register_hook(lambda _: events.append("E"))
        return sums

    layer.experts.compute = heard
