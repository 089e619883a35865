"""Copies what a rank saves, between two steps, so that the training can go on while the copies are written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.checkpoints.shares import TensorBlock, TensorSpec, all_gather_specs, divide
from workers.distributed.parallel import RankGroups


@dataclass(frozen=True)
class Snapshot:
    """Tensors and extra values of the checkpoint of `step`.

    tensors: by canonical name (workers.checkpoints.state), the live tensors of this rank, or copies of its share.
    extra: JSON values, the same on all ranks.
    """

    step: int
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Any]


class Staging:
    """Knows the share of each rank, and copies tensors without making the training wait for the device.

    On a GPU the copies run on their own stream, beside the next forward and backward; the optimizer's next step waits
    for them on the device. Bias and law state need no further wait: they are changed after the optimizer step.

    Attributes:
        holds, shares: shape and dtype of what each rank holds and of what is in its share; empty before `divide`.
    """

    def __init__(self, groups: RankGroups, optimizer: torch.optim.Optimizer) -> None:
        self.device = groups.device
        self.holds: list[dict[str, TensorSpec]] = []
        self.shares: list[dict[str, TensorSpec]] = []
        self._group = groups.checkpoint_group
        self._stream: torch.cuda.Stream | None = None
        self._copies: list[torch.cuda.Event] = []
        if groups.device.type == "cuda":
            self._stream = torch.cuda.Stream(groups.device)
            optimizer.register_step_pre_hook(lambda *_: self._wait_for_copies())

    def divide(self, tensors: Mapping[str, Tensor]) -> None:
        """Agree on the shares, once: what a rank holds does not change in a run. Collective over checkpoint_group."""
        if not self.shares:
            self.holds = all_gather_specs(tensors, self._group)
            self.shares = divide(self.holds)

    def copy(self, tensors: Mapping[str, Tensor], block: TensorBlock) -> None:
        """Fill a block. Call `TensorBlock.wait` before reading it."""
        if (copied := block.fill(tensors, self._stream)) is not None:
            self._copies.append(copied)

    def _wait_for_copies(self) -> None:
        """Before the optimizer step: make its stream wait, not the host."""
        for copied in self._copies:
            torch.cuda.current_stream(self.device).wait_event(copied)
        self._copies.clear()
