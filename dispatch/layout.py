"""The order of all MoE layers' loads in one vector."""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class LoadLayout:
    """Which MoE layers a load vector has, in its order.

    names: module names. num_experts: the experts of each layer. balanced: False where the law must not move the bias.
    """

    names: tuple[str, ...]
    num_experts: tuple[int, ...]
    balanced: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.num_experts) == len(self.balanced):
            raise ValueError(
                f"names ({len(self.names)}), num_experts ({len(self.num_experts)}) and balanced ({len(self.balanced)}) "
                "must have one entry a layer"
            )

    @property
    def total(self) -> int:
        """N: the length of a load or bias vector. 0 without MoE layers."""
        return sum(self.num_experts)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The slice of the vector that has each layer's experts."""
        ends = list(accumulate(self.num_experts))
        return tuple(slice(end - size, end) for end, size in zip(ends, self.num_experts, strict=True))
