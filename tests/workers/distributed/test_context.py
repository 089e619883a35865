"""The places of ranks that share sequences, and gathering them."""

import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from workers.distributed.context import Context


def test_places_are_runs_of_one_length_but_the_last() -> None:
    def chunks(size: int, seq_len: int) -> list[range]:
        return [Context(rank, size, None).chunk(seq_len) for rank in range(size)]  # type: ignore[arg-type]

    assert chunks(2, 13) == [range(7), range(7, 13)]
    assert chunks(3, 13) == [range(5), range(5, 10), range(10, 13)]
    assert chunks(4, 12) == [range(3), range(3, 6), range(6, 9), range(9, 12)]


def gathers(rank: int, world_size: int) -> None:
    context = Context(rank, world_size, dist.group.WORLD)
    whole = torch.arange(14.0).view(1, 7, 2).requires_grad_()
    gathered = context.gather_tokens(context.local_tokens(whole), 7)
    assert torch.equal(gathered, whole)
    # A rank weighs a place by its own number: its gradient is summed over the ranks.
    (gathered * (rank + 1)).sum().backward()
    expected = torch.zeros(1, 7, 2)
    context.local_tokens(expected).fill_(sum(range(1, world_size + 1)))
    assert torch.equal(whole.grad, expected)


def test_places_of_all_ranks_are_gathered_and_their_gradients_summed() -> None:
    for world_size in (2, 3):
        run_ranks(world_size, gathers)
