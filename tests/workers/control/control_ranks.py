"""What the tests of the control path share: a live bias, its loop, loads of known numbers, and the oracle."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dispatch.laws import BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout
from workers.control.loop import ControlLoop, StepControl

LAYOUT = LoadLayout(names=("a", "b", "c"), num_experts=(4, 2, 4), balanced=(True, True, False))  # B9, B10
CONFIG = BalanceConfig(law="sign", rate=0.01)
NO_LOAD = torch.zeros(LAYOUT.total, dtype=torch.int64)
NO_SUMS, NO_FLOATS = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)


class LiveBias:
    """A live bias, written in place."""

    def __init__(self, layout: LoadLayout = LAYOUT) -> None:
        self.bias_N = torch.zeros(layout.total)

    def loop(self, coordinator: Callable[[bytes], bytes] | None = None, **settings: Any) -> ControlLoop:
        law = Law(settings.pop("config", CONFIG), settings.pop("layout", LAYOUT))
        defaults = {"law": law, "run_id": "run", "timeout_s": 20.0}
        assert dist.group.WORLD is not None
        return ControlLoop(
            group=dist.group.WORLD,
            read_bias=self.bias_N.clone,
            write_state=lambda state: self.bias_N.copy_(state.bias_N),
            coordinator=coordinator,
            **{**defaults, **settings},
        )


def load_of(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 50, (LAYOUT.total,), generator=generator)


def one_step(loop: ControlLoop, step: int, rank: int, *, apply: bool = True, stop: bool = False) -> StepControl:
    loop.begin_step(step, load_of(step, rank), NO_SUMS, NO_FLOATS, NO_SUMS, stop_requested=stop)
    return loop.finish_step(apply=apply)


def plain_law(
    num_steps: int, world_size: int, skipped: tuple[int, ...] = (), config: BalanceConfig = CONFIG
) -> LawState:
    """The oracle: one process, the law on the summed loads."""
    law = Law(config, LAYOUT)
    state = law.initial_state()
    for step in range(num_steps):
        if step not in skipped:
            state = law.update(sum((load_of(step, rank) for rank in range(world_size)), NO_LOAD), state, step)
    return state
