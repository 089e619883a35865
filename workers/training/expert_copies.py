"""Copies of hot experts during training: placed anew every so many steps, by the loads of the steps before.

Every rank places them by itself. It has the summed loads of all ranks from the control path, as integers, and
`place_copies` is a function of these alone: so all ranks place the same copies, at the same step, and send no message.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dispatch.copies import LayerCopies
from dispatch.exchange.expert_copies import ExpertCopies, place_copies
from dispatch.layer import MoELayer
from dispatch.layout import LoadLayout
from workers.distributed.parallel import ParallelConfig, RankGroups


@dataclass(frozen=True)
class CopiesPlaced:
    """A new placement.

    num_copies: of all layers and ranks. before, after: the busiest rank's load over the mean, mean over layers, in the
    steps that placed them: with the copies of before, and with these.
    """

    num_copies: int
    before: float
    after: float


class ExpertCopying:
    """The copies of all layers of a model. Every rank calls it together, in a step's order.

    ranks_per_node: neighbouring ranks of an EP group on one node; a copy takes the tokens of its node first.
    """

    def __init__(self, model: nn.Module, layout: LoadLayout, config: ParallelConfig, ranks_per_node: int) -> None:
        # In module order, as the loads are: a layer has one router.
        self._layers = [LayerCopies(module) for module in model.modules() if isinstance(module, MoELayer)]
        self._layout, self._config, self._ranks_per_node = layout, config, ranks_per_node
        self._load_N = torch.zeros(layout.total, dtype=torch.int64)

    def sum_gradients(self) -> None:
        """After the last backward, before gradients are reduced: those of the copies go to the owners."""
        for layer in self._layers:
            layer.sum_gradients()

    def end_step(self, step: int, load_N: Tensor) -> CopiesPlaced | None:
        """After the optimizer: place anew where it is due, and give all copies their weights. None for no change.

        load_N: of the step over all ranks, the same on each.
        """
        self._load_N += load_N
        placed = None
        if step % self._config.copies_every == 0:
            placed = self._place([self._load_N[where].tolist() for where in self._layout.slices])
            self._load_N.zero_()
        for pending in [each for layer in self._layers for each in layer.send_weights()]:
            pending.wait()
        return placed

    def _place(self, loads_LE: Sequence[Sequence[int]]) -> CopiesPlaced | None:
        before = [layer.placed for layer in self._layers]
        after = [self._placement(loads_E, layer.placed) for loads_E, layer in zip(loads_LE, self._layers, strict=True)]
        if after == before:
            return None
        for layer, copies in zip(self._layers, after, strict=True):
            layer.place(copies)
        return CopiesPlaced(
            sum(each.num_copies for each in after), _busiest(before, loads_LE), _busiest(after, loads_LE)
        )

    def _placement(self, loads_E: Sequence[int], now: ExpertCopies) -> ExpertCopies:
        size, copies = now.placement.ep_size, self._config.expert_copies
        return place_copies(loads_E, size, copies, ranks_per_node=self._ranks_per_node)


def expert_copying(
    model: nn.Module, layout: LoadLayout, config: ParallelConfig, groups: RankGroups
) -> ExpertCopying | None:
    """For a run that wants copies; None for others, and where each rank has all experts."""
    if not config.expert_copies or groups.ep_size == 1:
        return None
    ranks_per_node = torch.distributed.get_world_size(groups.nodes.local_group) if groups.nodes else 1
    return ExpertCopying(model, layout, config, ranks_per_node)


def _busiest(copies: Sequence[ExpertCopies], loads_LE: Sequence[Sequence[int]]) -> float:
    return sum(each.busiest(loads_E) for each, loads_E in zip(copies, loads_LE, strict=True)) / len(copies)
