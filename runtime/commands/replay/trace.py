"""What laws are simulated on: the router scores of a run, step by step, recorded or made up.

Shapes: T tokens of a step (may differ by step and be 0), E experts of a layer.
"""

from typing import Protocol

from torch import Tensor

from dispatch.config import RouterConfig
from dispatch.layout import LoadLayout


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
    def router(self) -> RouterConfig:
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
