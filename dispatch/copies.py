"""Copies of a layer's hot experts in training: weights travel from the owners to the copies, gradients back."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispatch.diagnosis.activity_tracker import PendingCollective
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.expert_copies import ExpertCopies
from dispatch.experts.joined_rows import JoinedRows
from dispatch.layer import MoELayer


class LayerCopies:
    """The copies of one layer's experts. Every rank of the EP group makes one, and all call its methods together.

    A training step is, in this order: forward and backward; `sum_gradients`; the sum of an expert's gradient over its
    replicas; the optimizer; `place`, where the placement changes; `send_weights`. The update is the same as without
    copies, but for the order in which gradients are summed. Parameters, optimizer state and checkpoints have each
    expert once, with its owner.

    Args:
        layer: its dispatcher must be an `AllToAllDispatcher`; `place` replaces it.
    Raises:
        ValueError: the dispatcher is of another class.
    """

    def __init__(self, layer: MoELayer) -> None:
        if not isinstance(layer.dispatcher, AllToAllDispatcher):
            kind = type(layer.dispatcher).__name__
            raise ValueError(f"{kind} cannot send rows to copies; use an AllToAllDispatcher, or one derived from it")
        self._layer, self._plain = layer, layer.dispatcher  # the dispatcher without copies
        self.placed, self._copies_are_new = ExpertCopies(self._plain.placement), False
        self._routes = self._routes_of(self.placed)

    def place(self, copies: ExpertCopies) -> None:
        """Let the layer use these copies from now on; they have no weights until `send_weights`."""
        if copies == self.placed:
            return
        self.placed, self._copies_are_new = copies, True
        self._routes = self._routes_of(copies)
        self._layer.dispatcher = self._plain.with_copies(copies) if copies.holders else self._plain
        experts, num_copies = self._layer.experts, sum(self._routes.received_P)
        for joined in experts.joined.values():
            joined.separate()
        parameters = experts.named_parameters(recurse=False) if num_copies else ()
        experts.joined = {name: JoinedRows(parameter, num_copies) for name, parameter in parameters}

    def send_weights(self) -> list[PendingCollective]:
        """Start to send the owners' weights to the copies; wait for every returned collective before the next forward.

        Frozen weights, nearly all of a model in fine-tuning, travel only in the first call after `place`.
        """
        pending = []
        for name, own in self._parameters():
            if not (own.requires_grad or self._copies_are_new):
                continue
            mine = self._layer.experts.joined.get(name)
            received = _no_rows(own) if mine is None else mine.copies.detach()
            rows = own.detach()[self._routes.sent]
            pending.append(self._start(received, rows, self._routes.received_P, self._routes.sent_P))
        self._copies_are_new = False
        return pending

    def sum_gradients(self) -> None:
        """Add the gradients of the copies to those of the owners, in order of rank, and clear them."""
        for name, own in self._parameters():
            if own.requires_grad:
                self._sum(own, self._layer.experts.joined.get(name))

    def _routes_of(self, copies: ExpertCopies) -> "_Routes":
        return _Routes.for_rank(copies, self._plain.ep_rank, next(self._layer.experts.parameters()).device)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._layer.experts.named_parameters(recurse=False)) if self.placed.holders else []

    def _sum(self, own: nn.Parameter, mine: JoinedRows | None) -> None:
        routes = self._routes
        received = own.new_empty(sum(routes.sent_P), *own.shape[1:])
        gradient = _no_rows(own) if mine is None else mine.take_gradient()
        self._start(received, gradient, routes.sent_P, routes.received_P).wait()
        if own.grad is None:  # no backward ran here, but copies of this rank's experts may have gradients
            own.grad = torch.zeros_like(own)
        # Rank by rank: several ranks may hold a copy of one expert, and on CUDA one call would add their rows in any
        # order. A sum in a fixed order gives the same bits every time.
        for local_ids, rows in zip(routes.sent.split(routes.sent_P), received.split(routes.sent_P), strict=True):
            own.grad.index_add_(0, local_ids, rows)

    def _start(
        self, received: Tensor, rows: Tensor, output_splits: list[int], input_splits: list[int]
    ) -> PendingCollective:
        meter, group = self._plain.meter, self._plain.ep_group
        meter.count_bytes(rows.nbytes, "network")
        return meter.tracker.start(
            dist.all_to_all_single, received, rows.contiguous(), output_splits, input_splits, group=group
        )


@dataclass(frozen=True)
class _Routes:
    """Which of a rank's own experts it sends to which ranks, and how many copies it receives from each.

    sent: int64, local ids of the experts to send: those that rank 0 has copies of, by id, then those for rank 1, and so
    on; on the device, once for all steps. sent_P, received_P: how many experts go to each rank, and come from each.
    Experts arrive in order of rank, and so of id, which is the order of `ExpertCopies.copies_on`.
    """

    sent: Tensor
    sent_P: list[int]
    received_P: list[int]

    @classmethod
    def for_rank(cls, copies: ExpertCopies, ep_rank: int, device: torch.device) -> "_Routes":
        """The routes of one rank."""
        owned_P = [copies.placement.owned_by(rank) for rank in range(copies.placement.ep_size)]
        own, held = owned_P[ep_rank], copies.copies_on(ep_rank)
        sent = [
            [expert - own.start for expert in copies.copies_on(rank) if expert in own] for rank in range(len(owned_P))
        ]
        return cls(
            sent=torch.tensor([local_id for ids in sent for local_id in ids], dtype=torch.int64, device=device),
            sent_P=list(map(len, sent)),
            received_P=[sum(expert in ids for expert in held) for ids in owned_P],
        )


def _no_rows(own: Tensor) -> Tensor:
    return own.new_empty(0, *own.shape[1:])
