"""Settings of the ranks that contradict themselves or the number of ranks are refused with a way out."""

import pytest

from workers.distributed.parallel import ParallelConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ep_size": -1}, r"parallel.ep_size \(-1\) must be 0 \(all workers\) or a positive number"),
        (
            {"exchange": "ring"},
            "parallel.exchange is 'ring'; it must be one of auto, rank, assignment, node, deep_ep",
        ),
        ({"payload": "int4"}, "parallel.payload is 'int4'; it must be one of compute, fp8"),
        (
            {"ranks_per_node": -2},
            r"parallel.ranks_per_node \(-2\) must be 0 \(as they are placed\) or a positive number",
        ),
        ({"replicate": 0, "shard": "full"}, r"parallel.replicate \(0\) must be at least 1"),
        ({"context": 0}, r"parallel.context \(0\) must be at least 1"),
        ({"replicate": 2}, r"parallel.replicate \(2\) .*parallel.shard is 'none'.*set --parallel.shard full"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        ({"ep_size": 3}, 4, r"parallel.ep_size \(3\) must divide the number of workers \(4\); use one of \[1, 2, 4\]"),
        ({"ranks_per_node": 4, "ep_size": 2}, 4, r"ranks_per_node \(4\) must divide parallel.ep_size \(2\)"),
        ({"replicate": 3, "shard": "full"}, 8, r"replicate \(3\) must divide the number of workers \(8\).*\[1, 2, 4\]"),
        ({"replicate": 4, "shard": "full"}, 4, r"into groups of at least two.*use one of \[1, 2\]"),
        (
            {"replicate": 4, "ep_size": 4, "shard": "full"},
            8,
            r"hold the same experts \(2, at .*ep_size 4\); use .*\[1, 2\]",
        ),
        ({"context": 3}, 4, r"parallel.context \(3\) must divide the number of workers \(4\); use one of \[1, 2, 4\]"),
        ({"ranks_per_node": 3}, 4, r"ranks_per_node \(3\) must divide parallel.ep_size \(4\)"),
    ],
)
def test_ranks_that_do_not_divide_are_refused(settings, world_size, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings).resolve(world_size)


def test_all_workers_are_one_expert_parallel_group_unless_told_otherwise():
    assert ParallelConfig().resolve(6) == 6
    assert ParallelConfig(ep_size=2, exchange="node", ranks_per_node=1).resolve(6) == 2


@pytest.mark.parametrize(
    ("world_size", "ep_size", "replicas"),
    [(8, 2, 4), (8, 8, 4), (6, 2, 3), (4, 2, 2), (3, 2, 1), (2, 2, 1), (1, 1, 1)],
)
def test_a_gang_of_another_size_has_as_many_replicas_as_fit(world_size, ep_size, replicas):
    # Of four replicas on eight ranks. EP 2 stays where it divides: of three ranks each has all experts.
    moved = ParallelConfig(ep_size=ep_size, shard="full", replicate=4).resized_to(world_size)
    assert moved.replicate == replicas
    assert moved.resolve(world_size) == (1 if world_size == 3 else ep_size)


@pytest.mark.parametrize(("world_size", "context"), [(8, 4), (6, 3), (4, 4), (2, 2), (5, 1)])
def test_a_gang_of_another_size_shares_sequences_among_as_many_as_fit(world_size, context):
    moved = ParallelConfig(ep_size=1, context=4).resized_to(world_size)
    assert moved.context == context
    assert moved.resolve(world_size) == 1
