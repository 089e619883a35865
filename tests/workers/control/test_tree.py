"""The sums along the tree: those of gloo's ring, in as few hops, and an error where a rank does not come."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks
from workers.control.wire import Reduction, _children_and_parent, tree_all_reduce

NUM_COUNTS, NUM_FLOATS, NUM_MAXIMA = 1001, 3, 2
NUM_BYTES = 8 * (NUM_COUNTS + NUM_FLOATS + NUM_MAXIMA)


def _mine(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    counts = torch.randint(-(10**15), 10**15, (NUM_COUNTS,), generator=generator)
    floats = torch.rand(NUM_FLOATS, generator=generator, dtype=torch.float64)
    return counts, floats, torch.randint(-99, 99, (NUM_MAXIMA,), generator=generator)


def _by_tree_and_ring(rank: int, world_size: int) -> tuple[bool, Tensor, list[int]]:
    assert dist.group.WORLD is not None
    isend, sent = dist.isend, list[int]()

    def counting_isend(tensor: Tensor, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return isend(tensor, **kwargs)

    dist.isend = counting_isend  # type: ignore[assignment]  # of this process, which ends with the test
    counts, floats, maxima = _mine(rank)
    ring = [tensor.clone() for tensor in (counts, floats, maxima)]
    for tensor, op in zip(ring, (dist.ReduceOp.SUM, dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=True):
        dist.all_reduce(tensor, op)
    reduction = tree_all_reduce((counts, floats), maxima, group=dist.group.WORLD, async_op=False)
    same = counts.equal(ring[0]) and maxima.equal(ring[2]) and torch.allclose(floats, ring[1], rtol=1e-15)
    return same and reduction.is_completed(), floats, sent


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_the_tree_sums_what_the_ring_sums_and_sends_twice_for_each_rank_but_one(world_size: int) -> None:
    by_rank = run_ranks(world_size, _by_tree_and_ring)
    assert all(same for same, *_ in by_rank)
    assert all(floats.equal(by_rank[0][1]) for _, floats, _ in by_rank)  # to the bit, on all ranks
    assert [num_bytes for *_, sent in by_rank for num_bytes in sent] == [NUM_BYTES] * 2 * (world_size - 1)


def test_a_tree_of_any_size_reaches_every_rank_once_within_its_hops() -> None:
    for world_size in range(1, 70):
        depth = dict.fromkeys(range(world_size), 0)
        for rank in range(world_size):
            children, parent = _children_and_parent(rank, world_size)
            assert all(_children_and_parent(child, world_size)[1] == rank for child in children)
            assert parent is None if rank == 0 else parent in range(rank)
            depth[rank] = 0 if parent is None else depth[parent] + 1
        assert max(depth.values()) <= (world_size - 1).bit_length()


def _without_rank_3(rank: int, _: int) -> float:
    assert dist.group.WORLD is not None
    counts, floats, maxima = _mine(rank)
    began = time.monotonic()
    if rank == 3:
        time.sleep(3.0)
    else:
        reduction = Reduction((counts, floats), maxima, dist.group.WORLD)
        with pytest.raises(RuntimeError, match=r"(?i)timed out|closed|reset"):
            reduction.wait(timedelta(seconds=1.0))
        assert not reduction.is_completed()
    return time.monotonic() - began


def test_every_rank_gives_up_in_time_where_one_does_not_come() -> None:
    waited = run_ranks(4, _without_rank_3)
    assert max(waited[:3]) < 3.0
