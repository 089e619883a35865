"""Copies of hot experts during training: placed anew every `parallel.copies_every` steps, by the loads of these steps.

The ranks send no message to agree on a placement. Each has the loads of all ranks, summed as integers on the control
path, and `place_copies` is a function of these alone: so all ranks place the same copies at the same step.
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
    """A new placement of copies.

    num_copies: in all layers and on all ranks. before, after: the busiest rank's load over the mean load, averaged over
    layers, for the loads that decided: with the placement before, and with this one.
    """

    num_copies: int
    before: float
    after: float


class ExpertCopying:
    """The copies of all layers of a model. Every rank calls each method at the same place of a step.

    ranks_per_node: neighbouring ranks of an EP group on one node; a copy takes the tokens of its node first.
    """

    def __init__(self, model: nn.Module, layout: LoadLayout, config: ParallelConfig, ranks_per_node: int) -> None:
        # In module order, as the loads are: a layer has one router.
        self._layers = [LayerCopies(module) for module in model.modules() if isinstance(module, MoELayer)]
        self._layout, self._config, self._ranks_per_node = layout, config, ranks_per_node
        self._load_N = torch.zeros(layout.total, dtype=torch.int64)

    def sum_gradients(self) -> None:
        """Add the gradients of copies to those of their owners. After the last backward; collective."""
        for layer in self._layers:
            layer.sum_gradients()

    def end_step(self, step: int, load_N: Tensor) -> CopiesPlaced | None:
        """Place copies anew where that is due, and send all copies their owners' weights. After the optimizer.

        load_N: of the step, summed over all ranks. Returns the new placement, None where it did not change. Collective.
        """
        self._load_N += load_N
        placed = None
        if step % self._config.copies_every == 0:
            placed = self._place([self._load_N[experts].tolist() for experts in self._layout.slices])
            self._load_N.zero_()
        # All layers start sending before any is waited for.
        for pending in [each for layer in self._layers for each in layer.send_weights()]:
            pending.wait()
        return placed

    def _place(self, load_by_layer: Sequence[Sequence[int]]) -> CopiesPlaced | None:
        before = [layer.placed for layer in self._layers]
        after = [
            place_copies(
                load_E, copies.placement.ep_size, self._config.expert_copies, ranks_per_node=self._ranks_per_node
            )
            for load_E, copies in zip(load_by_layer, before, strict=True)
        ]
        if after == before:
            return None
        for layer, copies in zip(self._layers, after, strict=True):
            layer.place(copies)
        return CopiesPlaced(
            sum(each.num_copies for each in after), _imbalance(before, load_by_layer), _imbalance(after, load_by_layer)
        )


def expert_copying(
    model: nn.Module, layout: LoadLayout, config: ParallelConfig, groups: RankGroups
) -> ExpertCopying | None:
    """The copies of a run; None where the settings want none, or where each rank has all experts."""
    if not config.expert_copies or groups.ep_size == 1:
        return None
    ranks_per_node = torch.distributed.get_world_size(groups.nodes.local_group) if groups.nodes else 1
    return ExpertCopying(model, layout, config, ranks_per_node)


def _imbalance(copies: Sequence[ExpertCopies], load_by_layer: Sequence[Sequence[int]]) -> float:
    """The busiest rank's load over the mean load, averaged over layers."""
    return sum(each.busiest(load_E) for each, load_E in zip(copies, load_by_layer, strict=True)) / len(copies)
