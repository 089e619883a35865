"""The plan's sums of gradients and gathers of weights against what collectives of a real step are given."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.sharding import RingBytes, planned_bytes
from cluster.config import ClusterConfig
from runtime.settings.config import TrainConfig
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.distributed.parallel import ParallelConfig, Shard
from workers.training.worker_spec import WorkerSpec

NORM_BYTES = 8 * 2  # of the gradient, in float64


def sent_bytes(rank: int, world_size: int, specs: list[WorkerSpec]) -> list[int]:
    found = []
    for spec in specs:
        state = join_worker(spec, rank, world_size, f"{len(found)}")._state
        with state.open_control() as control:
            trainer = state.trainer(control)
            with RingBytes() as counted:
                trainer.step(1)
        found.append(counted.by_group_size.total())
    return found


def test_gradients_and_gathered_weights_cost_what_the_plan_says(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, global_batch_size=16, micro_batch_size=2)  # two micro-batches
    spec = replace(spec, model=replace(spec.model, vocab_size=260))
    modes: tuple[Shard, ...] = get_args(Shard)
    specs = [replace(spec, parallel=ParallelConfig(shard=shard, ep_size=2, exchange="rank")) for shard in modes]
    specs += [replace(each, optim=replace(each.optim, name="muon")) for each in specs]
    specs += [
        replace(spec, parallel=ParallelConfig(shard=shard, replicate=2, ep_size=ep_size, exchange="rank"))
        for shard, ep_size in (("full", 1), ("full", 2), ("optimizer", 1))
    ]
    specs += [
        replace(spec, parallel=ParallelConfig(shard=shard, ep_size=2), run=replace(spec.run, dtype="bfloat16"))
        for shard in modes
    ]
    for by_mode in run_ranks(4, sent_bytes, specs):
        for each, counted in zip(specs, by_mode, strict=True):
            cluster, kept = ClusterConfig(num_workers=4, device="cpu"), ("run", "model", "parallel", "optim")
            config = TrainConfig(cluster=cluster, **{name: getattr(each, name) for name in kept})
            planned = planned_bytes(config).total()
            assert counted == pytest.approx(planned, abs=NORM_BYTES), (each.parallel, each.run.dtype, each.optim.name)
