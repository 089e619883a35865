"""Measures steps of the real trainer, their routing, and in turns with them the rates of the machine."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks.simulate.barrier_clock import critical_path, over_ranks, stretches
from benchmarks.simulate.calibrate import NO_LINK, link_of, rates_of
from benchmarks.simulate.cases import MODELS, Case, cases_of
from runtime.commands.plan.simulate.hardware import Hardware, LinkCost, assumptions
from workers.actor import usable_cores
from workers.distributed.parallel import RankGroups, join_groups
from workers.training.rank_state import build_rank
from workers.training.step import Trainer
from workers.training.worker_spec import WorkerSpec

# The steps of a round, and the rounds. Many short rounds: over an hour other programs change the machine's rates by
# more than a tenth.
WARM_UP, STEPS, ROUNDS = 1, 3, 9


@dataclass(frozen=True)
class Measured:
    """One case. step_s: seconds of a step by `barrier_clock`. wall_s: by the wall clock. rates: without the links.

    load_LE: tokens of each expert in each layer in one step.
    """

    case: Case
    step_s: float
    wall_s: float
    load_LE: NDArray[np.float64]
    rates: Hardware


def measure(specs: Mapping[Case, WorkerSpec], rank: int, world_size: int) -> tuple[list[Measured], LinkCost, float]:
    """All cases of one world size, its link, and how much longer a sum takes. Collective; only rank 0 returns cases."""
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
    """Measure rates and steps in turn, round by round, so that a change of the machine's speed changes both."""
    crowding = max(1.0, groups.world_size / usable_cores())
    twin, trainer = (_trainer(each, specs[each], groups) for each in (case.twin, case))
    rounds = [(_steps(twin, at, groups), _rates(case, groups), _steps(trainer, at, groups)) for at in range(ROUNDS)]
    for each in (twin, trainer):
        each.control.close()
    step_s, wall_s = (statistics.median(getattr(run, name) for *_, run in rounds) for name in ("step_s", "wall_s"))
    found = [rates for _, rates, _ in rounds if rates is not None]
    if not found:
        return None
    host_s = statistics.median(run.step_s for run, *_ in rounds) / crowding / MODELS[case.model].num_layers
    return Measured(case, step_s, wall_s, rounds[-1][2].load_LE, replace(middle(found), host_s=host_s))


def middle(rounds: Sequence[Hardware]) -> Hardware:
    """The median of each rate."""
    names = [name for name in assumptions(rounds[0]) if "." not in name]
    return replace(rounds[0], **{name: statistics.median(getattr(each, name) for each in rounds) for name in names})


@dataclass(frozen=True)
class Run:
    """A few steps: the median of each clock, and the load of the last."""

    step_s: float
    wall_s: float
    load_LE: NDArray[np.float64]


def _steps(trainer: Trainer, at: int, groups: RankGroups) -> Run:
    """Make the steps of round `at`, after those to warm up. Collective."""
    results, seconds = [], []
    first = 1 + at * (WARM_UP + STEPS)
    for step in range(first, first + WARM_UP):
        trainer.step(step)
    for step in range(first + WARM_UP, first + WARM_UP + STEPS):
        with stretches(groups.tracker) as mine:
            results.append(trainer.step(step))
        seconds.append(critical_path(over_ranks(mine, groups.world_group), usable_cores()))
    load_LE = results[-1].control.counts_M.numpy().reshape(len(trainer.routers), -1)
    wall_s = statistics.median(result.step_s for result in results)
    return Run(statistics.median(seconds), wall_s, load_LE.astype(np.float64))


def _trainer(case: Case, spec: WorkerSpec, groups: RankGroups) -> Trainer:
    """A trainer whose routers have the bias of the case before its control path reads it."""
    state = build_rank(spec, groups)
    for router in state.routers.values():
        router.expert_bias_E.copy_(case.hot_bias(router.num_experts))
    return state.trainer(state.open_control())


def _rates(case: Case, groups: RankGroups) -> Hardware | None:
    """The rates, on rank 0; measured on as many ranks at once as there are cores, as in a step. Collective."""
    busy = groups.rank < usable_cores()
    rates = rates_of(MODELS[case.model], case.sequences, case.ep_size) if busy else None
    dist.barrier(groups.world_group)
    return rates if groups.rank == 0 else None
