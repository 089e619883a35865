"""Which tokens go to which rank of one process group, and the `TokenExchange` that carries them.

Shapes: C chunks, T tokens of a chunk (may be 0), K expert ids a token, S rows that leave, Q rows that arrive, W ids a
row, R rows of the local experts, P ranks of the group, E expert ids that the group knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.payload import Payload
from dispatch.exchange.row_map import RowMap
from dispatch.exchange.token_exchange import LinkKind, SplitSizes, TokenExchange
from dispatch.routing.selection import count_by_expert


@dataclass(frozen=True)
class _Tables:
    """The constants of a group, on one device. All int64.

    order_P: the other ranks, then this one. first_P: the first expert id of each rank. owner_E: the rank of each id,
    with one entry more at the end, P, for blank ids.
    """

    order_P: Tensor
    first_P: Tensor
    owner_E: Tensor


@dataclass(frozen=True)
class ExchangeGroup:
    """The ranks of a process group and their experts: rank p holds the next num_experts_P[p] of the ids 0 to E - 1.

    An id of E or above is blank: the token has been assigned to an expert that no rank of this group holds. A token's
    row goes once to each rank that holds one of its experts; `AssignmentGroup` sends a row for each expert instead.
    """

    num_experts_P: tuple[int, ...]
    process_group: dist.ProcessGroup
    meter: Meter
    buffer_pool: BufferPool
    link: LinkKind = "network"
    _tables: dict[torch.device, _Tables] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return dist.get_rank(self.process_group)

    @property
    def blank(self) -> int:
        """A local expert id that is blank for every receiver: no rank has so many experts."""
        return max(self.num_experts_P)

    def count(self, chunks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """For every chunk the rows to each rank (C, P) and the assignments of each expert (C, E); int64, on device."""
        num_experts = sum(self.num_experts_P)
        # All blank ids are counted as one extra expert, whose count is dropped.
        counts_CE = torch.stack(
            [count_by_expert(ids_TK.clamp(max=num_experts), num_experts + 1)[:num_experts] for ids_TK in chunks]
        )
        return torch.stack([self.needs(ids_TK).sum(0) for ids_TK in chunks]), counts_CE

    def needs(self, ids_TK: Tensor) -> Tensor:
        """Whether each token has an expert on each rank, bool (T, P)."""
        num_ranks = len(self.num_experts_P)
        needs_TP = torch.zeros(len(ids_TK), num_ranks + 1, dtype=torch.bool, device=ids_TK.device)
        return needs_TP.scatter_(1, self.owners(ids_TK), True)[:, :num_ranks]

    def exchange_sizes(self, sizes_CPX: Tensor, counts_CE: Tensor) -> tuple[Tensor, Tensor]:
        """Send each rank X integers for each chunk and the counts of its experts, and receive the same from each.

        Args:
            sizes_CPX: int64, the X integers for each chunk and rank.
            counts_CE: int64, assignments of each expert, of which each rank gets those of its own experts.
        Returns:
            What every rank sent here, int64 (P, C, X + L), and the `ActivityTracker.place_number` of every rank, (P,).
            Without the places a rank that left out a layer would read the sizes of one layer as those of another.

        Collective.
        """
        parts = [
            torch.cat([sizes, counts], 1)
            for sizes, counts in zip(sizes_CPX.unbind(1), counts_CE.split(self.num_experts_P, 1), strict=True)
        ]
        mine, tracker = parts[self.rank], self.meter.tracker
        place = mine.new_full((1,), tracker.place_number)
        received = mine.new_empty(len(parts), mine.numel() + 1)
        tracker.run(
            dist.all_to_all_single,
            received.view(-1),
            torch.cat([piece for part in parts for piece in (part.flatten(), place)]),
            [mine.numel() + 1] * len(parts),
            [part.numel() + 1 for part in parts],
            group=self.process_group,
        )
        return received[:, :-1].view(len(parts), *mine.shape), received[:, -1]

    def exchange(
        self, ids_TK: Tensor, input_splits: list[int], output_splits: list[int], payload: Payload, layer: str
    ) -> TokenExchange:
        """The exchange of these tokens. Does not wait for the device: the sizes are known on the host."""
        sizes = self.split_sizes(input_splits, output_splits, layer)
        order_P = self._tables_on(ids_TK.device).order_P
        needs_TP = self.needs(ids_TK)[:, order_P]  # this rank last, as `SplitSizes` wants it
        num_tokens, num_ranks = needs_TP.shape
        divisor = max(num_tokens, 1)  # without tokens there is nothing to divide, but a divisor of 0 is an error
        # Rows leave by rank, and for each rank by token: row s is entry (rank, token) of the flat (P, T) table.
        # nonzero_static with the known number of rows: `nonzero` would make the host wait.
        entry_S = torch.nonzero_static(needs_TP.t().flatten(), size=sizes.num_sent).squeeze(1)
        token_S = entry_S % divisor
        # The same rows by token, the order in which their results are summed: first their entries in the flat (T, P)
        # table, then the numbers of the rows at the same entries of the (P, T) table.
        by_token_S = torch.nonzero_static(needs_TP.flatten(), size=sizes.num_sent).squeeze(1)
        row_of_PT = needs_TP.t().flatten().cumsum(0) - 1
        row_S = row_of_PT[by_token_S % num_ranks * num_tokens + by_token_S // num_ranks]
        copies_T = needs_TP.sum(1)
        rows = RowMap(token_S, row_S, copies_T.cumsum(0) - copies_T)
        rank_S = order_P[entry_S // divisor]
        return TokenExchange(rows, rows, self.ids_for_receiver(ids_TK[token_S], rank_S), sizes, payload)

    def split_sizes(self, input_splits: list[int], output_splits: list[int], layer: str) -> SplitSizes:
        """The sizes of one exchange of this group."""
        return SplitSizes(
            input_splits, output_splits, self.process_group, self.meter, self.buffer_pool, self.link, layer
        )

    def ids_for_receiver(self, ids_SW: Tensor, rank_S: Tensor) -> Tensor:
        """The ids of each leaving row as its receiver's local expert ids, blank where another rank has the expert."""
        local_SW = ids_SW - self._tables_on(ids_SW.device).first_P[rank_S].unsqueeze(1)
        is_receivers_SW = self.owners(ids_SW) == rank_S.unsqueeze(1)
        return local_SW.masked_fill(~is_receivers_SW, self.blank).to(id_dtype(self.blank))

    def owners(self, ids: Tensor) -> Tensor:
        """The rank that holds the expert of each id; P where the id is blank."""
        return self._tables_on(ids.device).owner_E[ids.clamp(max=sum(self.num_experts_P))]

    def _tables_on(self, device: torch.device) -> _Tables:
        # Kept, since a copy from pageable host memory makes the host wait for the device.
        if device not in self._tables:
            num_ranks, sizes_P = len(self.num_experts_P), torch.tensor(self.num_experts_P)
            order_P = torch.tensor([p for p in range(num_ranks) if p != self.rank] + [self.rank])
            owner_E = torch.arange(num_ranks + 1).repeat_interleave(torch.tensor([*self.num_experts_P, 1]))
            tables = (order_P, sizes_P.cumsum(0) - sizes_P, owner_E)
            self._tables[device] = _Tables(*(table.to(device) for table in tables))
        return self._tables[device]


def id_dtype(largest: int) -> torch.dtype:
    """The dtype in which ids up to `largest` travel and are sorted: uint8 is small, and sorted by radix on CPUs."""
    return torch.uint8 if largest < 256 else torch.int32


def order_by_expert(ids_QW: Tensor, weights_QW: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sort the assignments of the arrived rows by local expert: the arrived row of each (R,) and its weight (R,).

    ids_QW: blank ids are larger than all others, so that they sort behind them. num_rows: R, the number of ids that are
    not blank, known on the host.
    """
    order_R = ids_QW.flatten().argsort(stable=True)[:num_rows]
    return order_R // max(ids_QW.shape[1], 1), weights_QW.flatten().gather(0, order_R)
