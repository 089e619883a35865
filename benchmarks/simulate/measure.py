"""Steps of the real trainer with the routing that they had, and the rates of the machine beside them."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks.simulate.barrier_clock import critical_path, over_ranks, stretches
from benchmarks.simulate.calibrate import NO_LINK, link_of, num_cores, rates_of
from benchmarks.simulate.cases import MODELS, Case, cases_of
from runtime.commands.plan.simulate.hardware import Hardware, Link
from workers.gang.parallel import RankGroups, join_groups
from workers.training.rank_state import build_rank
from workers.training.step import Trainer
from workers.training.worker_spec import WorkerSpec

WARM_UP, STEPS = 1, 3


@dataclass(frozen=True)
class Measured:
    """One case. step_s: as of ranks that nothing disturbs. wall_s: by the clock. rates: without the links.

    load_LE: tokens of each expert in each layer, of one step.
    """

    case: Case
    step_s: float
    wall_s: float
    load_LE: NDArray[np.float64]
    rates: Hardware


def measure(specs: Mapping[Case, WorkerSpec], rank: int, world_size: int) -> tuple[list[Measured], Link, float]:
    """All cases of one world size, its link, and how much longer a sum takes. Collective; of other ranks no cases."""
    torch.set_num_threads(1)
    first = next(iter(specs.values()))
    store = dist.FileStore(str(Path(first.run_dir) / f"store-{world_size}"), world_size)
    groups = join_groups(
        rank=rank,
        world_size=world_size,
        store=store,
        config=first.parallel,
        device=torch.device("cpu"),
        timeout_s=300.0,
    )
    link, reduce_factor = link_of(groups.world_group) if world_size > 1 else (NO_LINK, 1.0)
    found = [_measured(case, specs, groups) for case in cases_of(world_size)]
    dist.destroy_process_group()
    return [each for each in found if each is not None], link, reduce_factor


def _measured(case: Case, specs: Mapping[Case, WorkerSpec], groups: RankGroups) -> Measured | None:
    crowding = max(1.0, groups.world_size / num_cores())
    host_s = _steps(case.twin, specs[case.twin], groups)[0] / crowding / MODELS[case.model].num_layers
    rates = _rates(case, groups, host_s)
    step_s, wall_s, load_LE = _steps(case, specs[case], groups)
    return None if rates is None else Measured(case, step_s, wall_s, load_LE, rates)


def _steps(case: Case, spec: WorkerSpec, groups: RankGroups) -> tuple[float, float, NDArray[np.float64]]:
    """Seconds of a step as of undisturbed ranks, those by the clock, and the load of the last step. Collective."""
    trainer = _trainer(case, spec, groups)
    for step in range(WARM_UP):
        trainer.step(step + 1)
    results, seconds = [], []
    for step in range(STEPS):
        with stretches(groups.tracker) as mine:
            results.append(trainer.step(WARM_UP + step + 1))
        seconds.append(critical_path(over_ranks(mine, groups.world_group), num_cores()))
    trainer.control.close()
    load_LE = results[-1].control.counts_M.numpy().reshape(len(trainer.routers), -1)
    wall_s = statistics.median(result.step_s for result in results)
    return statistics.median(seconds), wall_s, load_LE.astype(np.float64)


def _trainer(case: Case, spec: WorkerSpec, groups: RankGroups) -> Trainer:
    """A trainer whose routers have the bias of the case before its control path reads it."""
    state = build_rank(spec, groups)
    for router in state.routers.values():
        router.expert_bias_E.copy_(case.hot_bias(router.num_experts))
    return state.trainer(state.open_control())


def _rates(case: Case, groups: RankGroups, host_s: float) -> Hardware | None:
    """On as many ranks at once as there are cores, as in a step, while the others wait. Rank 0's. Collective."""
    busy = groups.rank < num_cores()
    rates = rates_of(MODELS[case.model], case.sequences, case.ep_size, host_s) if busy else None
    dist.barrier(groups.world_group)
    return rates if groups.rank == 0 else None
