"""The settings of an MoE layer: how tokens choose, the sizes of its experts, and the order of its work."""

import math
from dataclasses import dataclass
from typing import Literal

from dispatch.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose their experts."""

    num_experts: int = 16
    """Routed experts of a layer, over all ranks."""
    top_k: int = 4
    """Experts chosen by each token."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Router score: sigmoid (DeepSeek-V3) or softmax over the experts."""
    num_groups: int = 1
    """Equal contiguous groups of experts for group-limited routing; 1 turns it off."""
    groups_kept: int = 1
    """Groups that a token may choose from."""
    scores_per_group: int = 2
    """Highest biased scores that are summed to rank a group."""
    normalize_weights: bool = True
    """Divide the combine weights by their sum over the chosen experts."""
    route_scale: float = 1.0
    """Factor on the combine weights after normalisation (2.5 in DeepSeek-V3)."""
    gate_bias: bool = False
    """Add a learned bias to the gate's logits (gpt-oss): a weight like others, not the selection bias of balancing."""

    def __post_init__(self) -> None:
        if self.score not in ("sigmoid", "softmax"):
            raise InvalidValue(f"score is {self.score!r}; it must be 'sigmoid' or 'softmax'")
        if not 1 <= self.top_k <= self.num_experts:
            raise InvalidValue(
                f"top_k ({self.top_k}) must be between 1 and num_experts ({self.num_experts}); lower top_k or add "
                "experts"
            )
        if not 0 < self.route_scale < math.inf:
            raise InvalidValue(f"route_scale ({self.route_scale}) must be above 0 and finite; 1 leaves the weights")
        if self.num_groups < 1:
            raise InvalidValue(f"num_groups ({self.num_groups}) must be at least 1, which is routing without groups")
        if self.num_groups > 1:
            self._check_groups()

    @property
    def groups(self) -> dict[str, int]:
        """The arguments of `dispatch.routing.selection.biased_scores` that limit a token to groups."""
        return {
            "num_groups": self.num_groups,
            "groups_kept": self.groups_kept,
            "scores_per_group": self.scores_per_group,
        }

    def _check_groups(self) -> None:
        if self.num_experts % self.num_groups:
            raise InvalidValue(f"num_experts ({self.num_experts}) must be a multiple of num_groups ({self.num_groups})")
        group_size = self.num_experts // self.num_groups
        if not 1 <= self.scores_per_group <= group_size:
            raise InvalidValue(
                f"scores_per_group ({self.scores_per_group}) must be between 1 and the experts of a group "
                f"({group_size})"
            )
        if not 1 <= self.groups_kept <= self.num_groups or self.groups_kept * group_size < self.top_k:
            raise InvalidValue(
                f"groups_kept ({self.groups_kept}) must be between 1 and num_groups ({self.num_groups}) and hold at "
                f"least top_k ({self.top_k}) experts; one group has {group_size}"
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig(RouterConfig):
    """Sizes and routing of one mixture-of-experts layer.

    Raises:
        InvalidValue: a value is out of its range, or two do not fit together. It is also a ValueError.

    Examples:
        >>> from dispatch import MoEConfig
        >>> MoEConfig(num_experts=8, top_k=16)
        Traceback (most recent call last):
        dispatch.errors.InvalidValue: top_k (16) must be between 1 and num_experts (8); lower top_k or add experts
    """

    ffn_hidden: int = 128
    """Inner width of an expert."""
    num_shared_experts: int = 1
    """Experts that every token passes through, computed as one feed-forward of this multiple of ffn_hidden; or 0."""
    shared_gate: bool = False
    """Weigh the shared experts' output by a sigmoid of the token's own, from a learned vector (Qwen2-MoE)."""
    expert_biases: bool = False
    """Whether the projections of routed experts add a bias (gpt-oss)."""
    swiglu_limit: float = 0.0
    """Bound of gate and up in routed experts, which then compute (up + 1) * gate * sigmoid(swiglu_alpha * gate)
    (gpt-oss); 0 for plain SwiGLU."""
    swiglu_alpha: float = 1.702
    """Slope of the sigmoid where swiglu_limit is not 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_hidden < 1 or self.num_shared_experts < 0:
            raise InvalidValue(
                f"ffn_hidden ({self.ffn_hidden}) must be at least 1 and num_shared_experts ({self.num_shared_experts}) "
                "at least 0"
            )
        if not 0 <= self.swiglu_limit < math.inf or not 0 < self.swiglu_alpha < math.inf:
            raise InvalidValue(
                f"swiglu_limit ({self.swiglu_limit}) must be at least 0 and finite, 0 for plain SwiGLU, and "
                f"swiglu_alpha ({self.swiglu_alpha}) above 0 and finite"
            )

    @property
    def has_plain_experts(self) -> bool:
        """Whether routed experts are plain SwiGLU without biases, the only kind that the fused kernels compute."""
        return not self.expert_biases and not self.swiglu_limit


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How an MoE layer orders exchange and computation, and how it bounds its memory.

    Results depend on it only by rounding: a matmul may sum in another order when it gets fewer rows. All ranks of an EP
    group must use the same values.

    Raises:
        InvalidValue: num_chunks is less than 1, or max_rows is negative. It is also a ValueError.
    """

    num_chunks: int = 1
    """Parts that a batch is cut into: while one is computed, the rows of the others travel, in backward too. It pays
    where the network or another thread moves the rows, but not on CPUs whose cores do both."""
    overlap: bool = True
    """Compute shared experts and other chunks while rows travel. If off, every exchange is awaited at once."""
    max_rows: int = 0
    """Most expert rows that a rank holds at once; 0 for no bound. If a batch would bring more to any rank, all ranks
    process it in as many rounds as needed and recompute each in backward: slower, but no token is dropped and memory
    does not grow with imbalance."""

    def __post_init__(self) -> None:
        if self.num_chunks < 1:
            raise InvalidValue(f"num_chunks ({self.num_chunks}) must be at least 1; 1 does not cut the batch")
        if self.max_rows < 0:
            raise InvalidValue(f"max_rows ({self.max_rows}) must be 0 (no bound) or a positive number of rows")
