"""The plan of ranks that share sequences, against what the collectives of a real step are given."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.config import ClusterConfig
from runtime.commands.plan.plan import make_plan
from runtime.commands.plan.subject import Subject
from runtime.settings.config import TrainConfig
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.distributed.parallel import ParallelConfig
from workers.model.attention import LatentConfig
from workers.training.worker_spec import WorkerSpec

# Index of the tensor or tensors that a rank holds of what it sends to each other rank.
SENT = {"c10d::allgather_": 1, "c10d::reduce_scatter_": 0}


class KeyBytes(TorchDispatchMode):
    """What this rank sends to the others for keys, values and their gradients: tensors of several dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.name() in SENT:
            (own,) = args[SENT[func.name()]]
            self.total += own.nbytes * (dist.ProcessGroup.unbox(args[2]).size() - 1) if own.ndim > 2 else 0
        return func(*args, **(kwargs or {}))


def counted_bytes(rank: int, world_size: int, specs: list[WorkerSpec]) -> list[int]:
    """Of a step of each run."""
    found = []
    for index, spec in enumerate(specs):
        state = join_worker(spec, rank, world_size, f"{index}")._state
        with state.open_control() as control, KeyBytes() as counted:
            state.trainer(control).step(1)
        found.append(counted.total)
    return found


def config_of(spec: WorkerSpec, world_size: int) -> TrainConfig:
    kept = {name: getattr(spec, name) for name in ("run", "model", "parallel", "optim")}
    return TrainConfig(cluster=ClusterConfig(num_workers=world_size, device="cpu"), **kept)


LATENT = LatentConfig(query_rank=12, kv_rank=10, nope_dim=6, rope_dim=4, value_dim=8)
# Ranks, ranks that share a sequence, and what else the run is; 16 places are 6, 6 and 4 of three ranks.
CASES: tuple[tuple[int, int, dict[str, Any], dict[str, Any]], ...] = (
    (2, 2, {}, {}),
    (2, 2, {}, {"dtype": "bfloat16"}),
    (2, 2, {"recompute": "attention"}, {"micro_batch_size": 2}),
    (2, 2, {"recompute": "full"}, {}),
    (2, 2, {"attention": "latent", "latent": LATENT}, {}),
    (2, 2, {"num_mtp_layers": 1}, {}),
    (4, 2, {}, {}),
    (3, 3, {}, {}),
)


@pytest.mark.parametrize("world_size", sorted({world_size for world_size, *_ in CASES}))
def test_keys_and_values_of_shared_sequences_cost_what_the_plan_says(tmp_path: Path, world_size: int) -> None:
    base = make_spec(tmp_path)
    specs = [
        replace(
            base,
            model=replace(base.model, **model),
            run=replace(base.run, **run),
            parallel=ParallelConfig(context=context, ep_size=1),
        )
        for ranks, context, model, run in CASES
        if ranks == world_size
    ]
    planned = [make_plan(Subject("test", config_of(spec, world_size), 1, ())).keys_bytes for spec in specs]
    assert all(planned)
    for found in run_ranks(world_size, counted_bytes, specs):
        assert found == planned
