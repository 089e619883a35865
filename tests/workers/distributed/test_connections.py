"""Ranks that wait for each other in several groups come free at once when one of them breaks its connections."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from workers.checkpoints.background import Background
from workers.distributed.connections import Connections, listening


def _wait_for_each_other(rank: int, world_size: int) -> float:
    before = listening()
    groups = [dist.new_group() for _ in range(world_size)]
    connections = Connections.formed_since(before, groups[0])
    waiting: Background[object] = Background("waits")
    # Each in a group that no other comes to: none of them would ever close its own.
    waiting.start(lambda: dist.all_reduce(torch.ones(1), group=groups[rank]))
    time.sleep(0.3)
    assert waiting.take() is None
    dist.barrier()
    begun = time.monotonic()
    if rank == 1:
        connections.abort()
    with pytest.raises(RuntimeError, match="closed"):
        while waiting.take() is None:
            time.sleep(0.01)
    took_s = time.monotonic() - begun
    dist.barrier()  # groups that were there before are left alone
    return took_s


def test_one_rank_that_breaks_its_connections_frees_all_that_wait_for_it():
    assert max(run_ranks(3, _wait_for_each_other)) < 5  # the collectives' own bound is 45 s


def _fail_together(rank: int, world_size: int) -> str:
    before = listening()
    group = dist.new_group()
    connections = Connections.formed_since(before, group)
    with pytest.raises((RuntimeError, KeyError)) as caught, connections.aborted_on_error():
        if rank == 0:
            raise KeyError("its own")
        dist.all_reduce(torch.ones(1), group=group)
    dist.barrier()
    return caught.typename


def test_the_error_of_one_rank_ends_the_wait_of_the_others_and_is_the_only_one_of_its_kind():
    assert run_ranks(3, _fail_together) == ["KeyError", "RuntimeError", "RuntimeError"]
