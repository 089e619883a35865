"""Bytes that a step sends inside a node and between nodes, and the least that there could be.

Shapes: T tokens of this rank (may be 0), K top-k, H hidden, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.diagnosis.meter import Message
from dispatch.exchange.payload import Payload, coded_row_bytes
from dispatch.exchange.placement import ExpertPlacement


@dataclass(frozen=True)
class Nodes:
    """Ranks of the default group in nodes of `size` neighbours, seen from `rank`."""

    rank: int
    size: int

    def is_same_node(self, rank: int) -> bool:
        """Whether a rank is on this rank's node."""
        return rank // self.size == self.rank // self.size

    def sent_bytes(self, messages: Sequence[Message]) -> dict[str, int]:
        """Bytes that these messages send: "node" to ranks of the same node, "network" to others."""
        sent = {"node": 0, "network": 0}
        for message in messages:
            for rank, rows in zip(dist.get_process_group_ranks(message.group), message.input_splits, strict=True):
                sent["node" if self.is_same_node(rank) else "network"] += rows * message.row_bytes
        return sent

    def floor_bytes(self, topk_ids_TK: Tensor, placement: ExpertPlacement, row_bytes: int) -> dict[str, int]:
        """The fewest bytes that this rank must send for these choices: "all" to other ranks, "network" to other nodes.

        One row of each token for each other rank, or node, that it needs. row_bytes: of a row over all four passes.
        """
        owner_E = torch.arange(placement.ep_size).repeat_interleave(torch.tensor(placement.num_local_experts))
        rank_TK = owner_E.to(topk_ids_TK.device)[topk_ids_TK]
        to_ranks = _num_others(rank_TK, placement.ep_size, self.rank)
        to_nodes = _num_others(rank_TK // self.size, placement.ep_size // self.size, self.rank // self.size)
        return {"all": to_ranks * row_bytes, "network": to_nodes * row_bytes}


def bytes_of_four_passes(hidden: int, itemsize: int, payload: Payload) -> int:
    """Bytes of one row over the four passes: to its experts and back, in forward and in backward."""
    # Only the first carries activations to experts; results and all gradients travel in the compute dtype.
    return coded_row_bytes(hidden, itemsize, payload) + 3 * hidden * itemsize


def _num_others(place_TK: Tensor, num_places: int, own: int) -> int:
    """Count the pairs of a token and a place that it must reach, other than `own`."""
    needs_TP = torch.zeros(len(place_TK), num_places, dtype=torch.bool, device=place_TK.device)
    needs_TP.scatter_(1, place_TK, True)
    needs_TP[:, own] = False
    return int(needs_TP.sum())
