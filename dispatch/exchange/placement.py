"""Which EP rank holds which experts."""

from dataclasses import dataclass

from dispatch.errors import InvalidValue


@dataclass(frozen=True)
class ExpertPlacement:
    """Contiguous runs of experts over the ranks of an EP group, those of the first ranks longer by one where needed.

    8 experts over 3 ranks:  rank 0: 0 1 2   rank 1: 3 4 5   rank 2: 6 7
    """

    num_experts: int
    ep_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.ep_size <= self.num_experts:
            raise InvalidValue(
                f"ep_size ({self.ep_size}) must be between 1 and num_experts ({self.num_experts}), so that every rank "
                "holds an expert; lower ep_size or raise num_experts"
            )

    @property
    def num_local_experts(self) -> tuple[int, ...]:
        """Experts held by each EP rank."""
        base, extra = divmod(self.num_experts, self.ep_size)
        return tuple(base + (rank < extra) for rank in range(self.ep_size))

    def owned_by(self, ep_rank: int) -> range:
        """Global ids of the experts that `ep_rank` holds."""
        if not 0 <= ep_rank < self.ep_size:
            raise ValueError(f"ep_rank ({ep_rank}) must be in [0, ep_size) with ep_size {self.ep_size}")
        sizes = self.num_local_experts
        start = sum(sizes[:ep_rank])
        return range(start, start + sizes[ep_rank])
