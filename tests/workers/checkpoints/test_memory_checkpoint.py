"""Checkpoints in memory: what survives the loss of a node, and that it is the state of its step."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks, start_process
from tests.workers.checkpoints.checkpoint_contents import differing, tensors_of
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.checkpoints import memory_checkpoint
from workers.checkpoints.checkpoint_files import CHECKPOINTS, CheckpointError
from workers.checkpoints.memory_checkpoint import HeldShare, newest_recoverable, partner_shift
from workers.distributed.parallel import ParallelConfig
from workers.record.run_log import read_events

# --- what can be recovered


def _shards(step, owners, world_size=3):
    return [HeldShare(step, owner, world_size) for owner in owners]


@pytest.mark.parametrize(
    ("holdings", "step"),
    [
        ([], None),
        ([[], []], None),
        ([_shards(4, [0, 1]), _shards(4, [1, 2])], 4),
        ([_shards(4, [0, 1]), _shards(4, [1])], None),  # rank 2's is nowhere
        ([_shards(4, [0, 2]) + _shards(6, [0]), _shards(4, [1, 0]) + _shards(6, [1, 0])], 4),  # 6 was being exchanged
        ([_shards(4, [0, 2]) + _shards(6, [0, 2]), _shards(6, [1, 0])], 6),
        ([_shards(4, [0, 1]), _shards(6, [2])], None),  # shares of two steps are not one checkpoint
        ([_shards(4, [0, 1], world_size=3), _shards(4, [2], world_size=4)], None),  # nor those of two gangs
        ([_shards(0, [0], world_size=1)], 0),
    ],
)
def test_the_newest_step_is_one_of_which_every_share_is_there(holdings, step):
    assert newest_recoverable(holdings) == step


@pytest.mark.parametrize(
    ("nodes", "ep_size", "shift"),
    [
        ((0, 0, 1, 1), 4, 2),
        ((0, 0, 0, 1, 1, 1), 6, 3),
        ((0, 1, 2), 3, 1),
        ((0, 0, 1, 1), 2, 2),  # and rank 2 holds the experts of rank 0
        ((0, 0, 1, 1, 2, 2, 3, 3), 4, 4),  # 2 and 6 are on another node too, but have other experts
        ((0, 0, 0, 0), 4, 1),  # one node: at least another process
        ((0, 0, 0, 0), 2, 2),
        ((0, 0, 0, 1), 4, 1),  # 2 of 4 at best
    ],
)
def test_partners_are_on_other_nodes_and_have_the_same_experts_where_they_can(nodes, ep_size, shift):
    assert partner_shift(nodes, ep_size) == shift


# --- a node is lost


def _elsewhere(worker, name):
    """The worker with another run directory: what it writes lies beside what the disk has."""
    worker._spec = replace(worker._spec, run_dir=worker._spec.run_dir.parent / name)
    worker._spec.run_dir.mkdir(exist_ok=True)
    return worker


def _rejoin(worker, rank, world_size, name):
    """The same process in a new gang, as after the loss of another one."""
    dist.barrier()
    worker.leave()
    store = dist.FileStore(str(worker._spec.run_dir.parent / f"store-{name}"), world_size)
    worker.join(rank=rank, world_size=world_size, store=store, timeout_s=20.0)


NODES = (0, 0, 1, 1)


def _lose_node_1(rank, world_size, spec):
    whole = join_worker(spec, rank, world_size, "whole", nodes=NODES)
    whole.train()
    held = whole.held_checkpoints()
    expected = whole_state(whole)
    survivor = rank < 2
    worker = _elsewhere(whole, "written")
    _rejoin(worker, rank, world_size, "again")
    if not survivor:
        worker._memory = memory_checkpoint.MemoryCheckpoints()  # a new process holds nothing
    path = worker.write_held(4)
    with pytest.raises(CheckpointError, match=r"step 3 is not whole in the memory of these .* nothing"):
        worker.write_held(3)
    assert worker.held_checkpoints() == (held if survivor else [])
    _elsewhere(worker, "run").train(path)
    state = whole_state(worker)
    return held, path, [name for name in expected if not torch.equal(state[name], expected[name])]


@pytest.mark.parametrize("ep_size", [0, 2])
def test_the_other_node_has_the_whole_step(tmp_path, ep_size):
    spec = make_spec(tmp_path, steps=5, memory_checkpoint_every=2, checkpoint_every=4, keep_checkpoints=9)
    spec = replace(spec, parallel=ParallelConfig(ep_size=ep_size))
    results = run_ranks(4, _lose_node_1, spec)
    #  rank 0 keeps its share and that of rank 2, which is on the other node
    for rank, (held, _, changed) in enumerate(results):
        assert sorted(held) == sorted(HeldShare(step, owner, 4) for step in (2, 4) for owner in (rank, (rank + 2) % 4))
        assert changed == []
    assert newest_recoverable([results[0][0], results[1][0]]) == 4
    assert newest_recoverable([results[0][0], results[2][0]]) is None
    assert differing(results[0][1], tmp_path / "run" / CHECKPOINTS / "step_00000004") == []
    random_states = [name for name in tensors_of(results[0][1]) if name.startswith("random.")]
    assert len(random_states) == 4
    opened = next(event for event in read_events(tmp_path / "run") if event["event"] == "memory_checkpoints")
    # Where replicas of the experts lie on the other node, only the random state travels.
    assert (opened["sent_bytes"] < 10_000) == (ep_size == 2)


# --- a process dies in the middle of an exchange


def _die_in_payload_of_step_4(spec):
    """Rank 3: has said how much comes, and is gone."""
    real, calls = memory_checkpoint._exchange_tensors, []

    def swap(*args):
        calls.append(args)
        if len(calls) == 4:  # header and content of step 2, header of step 4
            os._exit(17)
        real(*args)

    memory_checkpoint._exchange_tensors = swap
    join_worker(spec, 3, 4, "gang").train()


def _survive(rank, world_size, spec):
    worker = join_worker(spec, rank, 4, "gang")
    with pytest.raises(RuntimeError):
        worker.train()
    worker.leave()
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(spec.run_dir.parent / "store-3"), 3), rank=rank, world_size=3
    )
    held = [None] * 3
    dist.all_gather_object(held, worker.held_checkpoints())
    step = newest_recoverable(held)
    worker = _elsewhere(worker, "written")
    _rejoin(worker, rank, 3, "three")
    path = worker.write_held(step)
    outcome = _elsewhere(worker, "run").train(path)
    return held, step, path, outcome.completed


def test_a_death_in_the_middle_of_an_exchange_leaves_the_step_before(tmp_path):
    spec = make_spec(
        tmp_path, steps=8, memory_checkpoint_every=2, checkpoint_every=2, keep_checkpoints=99, async_checkpoints=False
    )
    doomed = start_process(_die_in_payload_of_step_4, spec)
    results = run_ranks(3, _survive, spec)
    doomed.join(10)
    assert doomed.exitcode == 17
    held, step, path, completed = results[0]
    assert step == 2
    assert completed
    # Whose partner lived may have step 4 as well; rank 3's own share of it is nowhere.
    assert all(shard.owner != 3 for holdings in held for shard in holdings if shard.step == 4)
    assert differing(path, tmp_path / "run" / CHECKPOINTS / "step_00000002") == []


# --- what arrives is what was sent


def _tear_step_4_on_rank_1(rank, world_size, spec):
    real, calls = memory_checkpoint._exchange_tensors, []

    def swap(outgoing, incoming, *args):
        real(outgoing, incoming, *args)
        calls.append(incoming)
        if rank == 1 and len(calls) == 4:
            incoming[0] += 1

    memory_checkpoint._exchange_tensors = swap
    worker = join_worker(spec, rank, world_size, "torn")
    places, room = set(), set()
    keep = worker._memory.keep

    def watched_keep(*args):
        keep(*args)
        places.update(block.bytes.data_ptr() for kept in worker._memory._kept for block in (kept.own, kept.partners))
        room.add(worker._memory.num_bytes)

    worker._memory.keep = watched_keep
    worker.train()
    # The room: two steps, own and partner's. No more of it after 20 of them than after one.
    assert (len(places), len(room)) == (4, 1)
    worker = _elsewhere(worker, "written")
    held = worker.held_checkpoints()
    for kept in worker._memory._kept:
        if rank == 0 and kept.step == 40:
            kept.own.bytes[0] += 1  # its partner has it still
    path = worker.write_held(40)
    for kept in worker._memory._kept:
        kept.partners.bytes[0] += 1
    with pytest.raises(CheckpointError, match=r"step 40 is not whole .*: they have rank 1 of 2$"):
        worker.write_held(40)
    return held, path


def test_a_torn_transfer_is_told_on_all_ranks_and_never_written(tmp_path):
    spec = make_spec(tmp_path, steps=41, memory_checkpoint_every=2, checkpoint_every=40)
    results = run_ranks(2, _tear_step_4_on_rank_1, spec)
    assert [{shard.step for shard in held} for held, _ in results] == [{38, 40}] * 2
    failed = [event for event in read_events(tmp_path / "run") if event["event"] == "memory_checkpoint_failed"]
    assert [event["reason"] for event in failed] == [
        "what a rank received of step 4 is not what was sent (crc32 differs)"
    ]
    assert differing(results[0][1], tmp_path / "run" / CHECKPOINTS / "step_00000040") == []
