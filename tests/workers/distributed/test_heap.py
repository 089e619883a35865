"""Memory that a sharded rank has freed is not kept in the heap."""

import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from workers.distributed.heap import give_back_large_blocks

NUM_BLOCKS, BLOCK, SMALL = 16, 2 << 20, 20_000  # of 8 MiB, each followed by one of 80 KB that stays


def kept_of_freed(rank: int, world_size: int, gives_back: bool) -> int:
    """Resident bytes after blocks are freed, above those before they were there."""
    if gives_back:
        assert give_back_large_blocks()
    del rank, world_size
    torch.ones(2 * BLOCK)  # freed at once: from now on glibc takes less than this from its heap
    before, blocks, stay = resident_bytes(), [], []
    for _ in range(NUM_BLOCKS):
        blocks.append(torch.ones(BLOCK))
        stay.append(torch.ones(SMALL))
    blocks.clear()
    return resident_bytes() - before


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_go_back_to_the_system_between_small_ones_that_stay() -> None:
    kept, given_back = (run_ranks(1, kept_of_freed, each)[0] for each in (False, True))
    assert given_back < 16 << 20
    assert kept > 4 * given_back, "glibc gives back by itself: workers.distributed.heap has no use any more"
