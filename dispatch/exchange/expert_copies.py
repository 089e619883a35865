"""Which hot experts get copies on which ranks, decided from loads alone: the problem that EPLB solves for serving.

An expert stays with its owner (`ExpertPlacement`), which keeps the optimizer state; a copy computes a part of the
expert's tokens in place of the owner. EPLB (deepseek-ai/EPLB) may move every expert, and splits the tokens of an expert
evenly over its copies. Here the owners stay, and a copy takes as many shares of the tokens as its rank has room for.

The tokens of all ranks are cut into S equal shares, G for each rank: token t of a rank is in share t % G of that rank.
We assume that the tokens of all shares choose alike: then an expert gets load / S tokens from each share. Loads of
ranks are counted in tokens times S, so that all numbers are integers and all ranks, from equal loads, decide alike.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain

from dispatch.exchange.placement import ExpertPlacement

# Few ranks cut their tokens into several shares each: with one share for each of 2 ranks, only half of a hot expert's
# tokens could be moved.
_MIN_SHARES = 16
# Parts of the mean load of a rank. Copies cost messages of weights and gradients in every step, so none are made
# where the busiest rank is within a twentieth of the mean. The search ends within a 128th of the best level.
_MIN_GAIN_DIVISOR = 20
_PRECISION_DIVISOR = 128


@dataclass(frozen=True)
class ExpertCopies:
    """Which rank computes each expert of a layer, for the tokens of each share.

    holders: for each expert with copies the rank that computes it, for each share (length S). All other experts are
    computed by their owners.
    """

    placement: ExpertPlacement
    holders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def shares_per_rank(self) -> int:
        """G: token t of a rank is in its share t % G."""
        return -(-_MIN_SHARES // self.placement.ep_size)

    @property
    def num_shares(self) -> int:
        """S: the shares of all ranks."""
        return self.placement.ep_size * self.shares_per_rank

    def copies_on(self, ep_rank: int) -> list[int]:
        """Experts that the rank holds a copy of, in order of id."""
        return self._copies_P[ep_rank]

    @cached_property
    def _copies_P(self) -> list[list[int]]:  # noqa: N802 - the shape is part of the name
        owned = [self.placement.owned_by(rank) for rank in range(self.placement.ep_size)]
        copies_P = [list[int]() for _ in owned]
        for expert, ranks in sorted(self.holders.items()):
            for rank in set(ranks):
                if expert not in owned[rank]:
                    copies_P[rank].append(expert)
        return copies_P

    @property
    def num_copies(self) -> int:
        """How many copies all ranks hold together."""
        return sum(map(len, self._copies_P))

    @property
    def num_physical(self) -> tuple[int, ...]:
        """The number of physical experts of each rank: its own experts and its copies.

        Their ids go rank by rank, and on each rank the own experts come first.
        """
        own = self.placement.num_local_experts
        return tuple(num + len(copies) for num, copies in zip(own, self._copies_P, strict=True))

    def physical_ids(self, ep_rank: int) -> list[list[int]]:
        """The physical expert that computes each expert (E), for each share of the rank's tokens (G)."""
        firsts = [0, *accumulate(self.num_physical)]
        num_own = self.placement.num_local_experts
        owners = chain.from_iterable(range(first, first + num) for first, num in zip(firsts[:-1], num_own, strict=True))
        owner_ids_E = list(owners)
        ids_GE = [list(owner_ids_E) for _ in range(self.shares_per_rank)]
        for expert, holder_S in self.holders.items():
            for share, ids_E in enumerate(ids_GE):
                holder = holder_S[ep_rank * self.shares_per_rank + share]
                if expert not in self.placement.owned_by(holder):
                    ids_E[expert] = firsts[holder] + num_own[holder] + self._copies_P[holder].index(expert)
        return ids_GE

    def rank_loads(self, loads_E: Sequence[int]) -> list[int]:
        """The load of each rank under these copies, in tokens times S; the mean over ranks is sum(loads_E) times G."""
        owners = chain.from_iterable([rank] * num for rank, num in enumerate(self.placement.num_local_experts))
        loads_P = [0] * self.placement.ep_size
        for expert, (owner, load) in enumerate(zip(owners, loads_E, strict=True)):
            if expert not in self.holders:
                loads_P[owner] += self.num_shares * load
            for rank in self.holders.get(expert, ()):
                loads_P[rank] += load
        return loads_P

    def busiest(self, loads_E: Sequence[int]) -> float:
        """Load of the busiest rank over the mean of all ranks; 1 where there are no tokens."""
        mean = sum(loads_E) * self.shares_per_rank  # in tokens times S, as `rank_loads`
        return max(self.rank_loads(loads_E)) / mean if mean else 1.0


def place_copies(
    loads_E: Sequence[int], ep_size: int, copies_per_rank: int, *, ranks_per_node: int = 1
) -> ExpertCopies:
    """Give hot experts copies on ranks with little load, so that the load of the busiest rank becomes small.

    A binary search for the lowest load (level) that a greedy assignment can keep on every rank: the busiest rank gives
    tokens away first, in as few copies as it can. It makes no copies where the load of the
    busiest rank is close to the mean without them.

    Args:
        loads_E: tokens of each expert over all ranks, non-negative integers.
        copies_per_rank: the most copies that one rank holds.
        ranks_per_node: neighbouring ranks that share a node. A copy takes the tokens of its own rank first, then those
            of its node.
    """
    owners = ExpertCopies(ExpertPlacement(len(loads_E), ep_size))
    quotas = _Search(tuple(map(int, loads_E)), owners, copies_per_rank).best()
    holders = {expert: _holders(quotas[expert], owners, ranks_per_node) for expert in sorted(quotas)}
    return ExpertCopies(owners.placement, holders)


_Quotas = dict[int, dict[int, int]]  # by expert and then rank: how many shares the rank computes, maybe 0


@dataclass(frozen=True)
class _Search:
    """The search in one layer. owners: the placement without copies."""

    loads_E: tuple[int, ...]
    owners: ExpertCopies
    copies_per_rank: int

    def best(self) -> _Quotas:
        """For each expert with copies, how many shares each of its holders computes."""
        mean = sum(self.loads_E) * self.owners.shares_per_rank
        low, high, best = mean + mean // _MIN_GAIN_DIVISOR, max(self.owners.rank_loads(self.loads_E)), _Quotas()
        while high - low > mean // _PRECISION_DIVISOR:
            level = (low + high) // 2
            quotas = self._within(level)
            if quotas is None:
                low = level + 1
            else:
                high, best = level, quotas
        return best

    def _within(self, level: int) -> _Quotas | None:
        """Copies with which no rank has more load than `level`; None where the greedy assignment finds none."""
        loads_P, quotas = self.owners.rank_loads(self.loads_E), _Quotas()
        rooms = _Rooms({rank: level - load for rank, load in enumerate(loads_P)}, self.copies_per_rank)
        for rank in sorted(range(len(loads_P)), key=lambda rank: (-loads_P[rank], rank)):
            if not self._shed(rank, loads_P[rank] - level, rooms, quotas):
                return None
        return quotas

    def _shed(self, rank: int, excess: int, rooms: "_Rooms", quotas: _Quotas) -> bool:
        """Move at least `excess` of the load of the rank's own experts to other ranks. Returns whether it could."""
        left = dict.fromkeys(self.owners.placement.owned_by(rank), self.owners.num_shares)  # shares that stay
        while excess > 0:
            moves = {
                expert: min(-(-excess // load), rooms.largest // load, left[expert])
                for expert in left
                if (load := self.loads_E[expert]) > 0
            }
            # The expert of which one copy can take most, as far as it must be moved; of equals that with the lower id.
            expert = max(moves, key=lambda expert: (min(moves[expert] * self.loads_E[expert], excess), -expert))
            if not (num_moved := moves[expert]):
                return False
            # No rank takes an expert twice: the first time it took all that had to move, or all that it had room for.
            taker = rooms.take(num_moved * self.loads_E[expert])
            left[expert] -= num_moved
            excess -= num_moved * self.loads_E[expert]
            quotas.setdefault(expert, {}).update({rank: left[expert], taker: num_moved})
        return True


class _Rooms:
    """How much more load each rank can take, sorted, of the ranks that can hold one more copy."""

    def __init__(self, room_of_rank: Mapping[int, int], copies_per_rank: int) -> None:
        self._copies_left = dict.fromkeys(room_of_rank, copies_per_rank)
        self._rooms = sorted((room, rank) for rank, room in room_of_rank.items() if room > 0 and copies_per_rank > 0)

    @property
    def largest(self) -> int:
        """The most that one rank can take; 0 where none can take any."""
        return self._rooms[-1][0] if self._rooms else 0

    def take(self, load: int) -> int:
        """Use room for this load on the rank with the least room that suffices, and return the rank.

        Larger rooms are kept for larger loads.
        """
        room, rank = self._rooms.pop(bisect_left(self._rooms, (load, -1)))
        self._copies_left[rank] -= 1
        if room > load and self._copies_left[rank]:
            insort(self._rooms, (room - load, rank))
        return rank


def _holders(quota: Mapping[int, int], owners: ExpertCopies, ranks_per_node: int) -> tuple[int, ...]:
    """Which rank computes an expert for each share (S), with as many shares for each rank as its quota.

    The rank that the tokens of the share are on, if its quota allows; else a rank of the same node; else any rank.
    """
    left = {rank: quota[rank] for rank in sorted(quota)}
    ranks = [share // owners.shares_per_rank for share in range(owners.num_shares)]
    holder_S = [-1] * len(ranks)
    for size in (1, ranks_per_node, owners.placement.ep_size):  # neighbouring ranks: the rank, its node, all
        for share, rank in enumerate(ranks):
            near = [other for other, num_left in left.items() if num_left and other // size == rank // size]
            if holder_S[share] < 0 and near:
                holder_S[share] = max(near, key=lambda other: (left[other], -other))
                left[holder_S[share]] -= 1
    return tuple(holder_S)
