"""What laws are played on: the scores of one run of a router, step by step, recorded or simulated.

Shapes: T tokens of a step (may differ by step and be 0), E experts of a layer.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dispatch.layout import LoadLayout


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How experts are chosen from scores; the settings of dispatch.config.RouterConfig."""

    top_k: int
    num_groups: int = 1
    groups_kept: int = 1
    scores_per_group: int = 2

    @property
    def groups(self) -> dict[str, Any]:
        """The arguments of `dispatch.routing.selection.biased_scores`."""
        return {
            "num_groups": self.num_groups,
            "groups_kept": self.groups_kept,
            "scores_per_group": self.scores_per_group,
        }


class Trace(Protocol):
    """Scores by step. Reading a step twice gives the same bits."""

    @property
    def name(self) -> str:
        """For titles."""
        ...

    @property
    def layout(self) -> LoadLayout:
        """The layers."""
        ...

    @property
    def choice(self) -> Choice:
        """How experts are chosen, the same in all layers."""
        ...

    @property
    def steps(self) -> range:
        """Numbers of the steps there are, from 1 where the first batch of a run was recorded."""
        ...

    @property
    def shift_step(self) -> int | None:
        """First step with another mix of text, if there is one."""
        ...

    def scores(self, step: int) -> list[Tensor]:
        """Fp32 (T, E) in [0, 1] for each layer."""
        ...
