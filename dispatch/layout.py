"""How the loads of all MoE layers lie in one vector."""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class LoadLayout:
    """Names, sizes and balancing switches of the MoE layers, in the order of the load vector.

    names: one module name a layer. num_experts: its experts. balanced: False where the law must leave the bias alone.
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
        """Where each layer lies in the vector."""
        ends = list(accumulate(self.num_experts))
        return tuple(slice(end - size, end) for end, size in zip(ends, self.num_experts, strict=True))
