"""Rows from rank to rank by all-to-all, with its backward. Shapes: P EP ranks; a rank may send or receive no row."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.meter import Meter


@dataclass(frozen=True)
class Route:
    """How many rows go where: to and from each EP rank.

    input_splits, output_splits: length P, rows sent to and received from each rank, as host integers.
    """

    input_splits: list[int]
    output_splits: list[int]
    group: dist.ProcessGroup
    meter: Meter

    def back(self) -> "Route":
        """The way that answers and gradients take."""
        return Route(self.output_splits, self.input_splits, self.group, self.meter)

    def exchange(self, rows: Tensor, phase: str) -> Tensor:
        """Send sum(input_splits) rows, in order of destination, and return those that arrive, in order of source.

        Backward sends the gradients back and is charged to `phase`. Collective, in backward too.
        """
        received: Tensor = _AllToAll.apply(rows, self, phase)
        return received

    def exchange_plain(self, rows: Tensor) -> Tensor:
        """`exchange` without gradients, for ids and counts."""
        received = rows.new_empty((sum(self.output_splits), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), self.output_splits, self.input_splits, group=self.group)
        away = len(rows) - self.input_splits[dist.get_rank(self.group)]
        self.meter.count_bytes(away * rows[:1].numel() * rows.element_size())
        return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, phase: str) -> Tensor:
        ctx.route, ctx.phase = route, phase
        return route.exchange_plain(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with ctx.route.meter.span(ctx.phase, grad.device):
            return ctx.route.back().exchange_plain(grad), None, None
