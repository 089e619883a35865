"""From a configuration to joined ranks: the specification that each worker gets, and the gang of these workers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.config import ClusterConfig
from dispatch.laws import BalanceConfig
from runtime.settings.config import TrainConfig
from workers.data.shards import Dataset
from workers.training.fault_plan import planned_faults
from workers.training.worker_spec import WorkerSpec

if TYPE_CHECKING:
    from cluster.gang.gang import Gang
    from workers.worker import Worker


class Ranks(Protocol):
    """Runs a method of every rank's worker. A gang does, and `_InProcess`, which is rank 0 in this process."""

    def run(self, method: str, *args: Any) -> list[Any]:
        """Call the method on every rank; returns the results by rank."""
        ...


@dataclass(frozen=True)
class LaunchedGang:
    """A gang with its coordinator."""

    gang: "Gang"
    coordinator: Any  # its Ray actor; None without one
    ray_s: float  # seconds until Ray was up
    gang_s: float  # seconds from then until all ranks had joined


def make_spec(config: TrainConfig, run_dir: Path, dataset: Dataset | None) -> WorkerSpec:
    """The specification that every rank gets, still without the coordinator. dataset: None if no text is read."""
    return WorkerSpec(
        # Absolute: a worker has a working directory of its own.
        run_dir=run_dir.absolute(),
        run_id=run_dir.name,
        data_dir=None if dataset is None else dataset.path,
        tokenizer=config.data.tokenizer and str(Path(config.data.tokenizer).expanduser().absolute()),
        run=config.run,
        mix=config.data.mix_schedule,
        model=config.model,
        balance=balance_of(config),
        optim=config.optim,
        parallel=config.parallel,
        aux=config.aux,
        device=config.cluster.device,
        control_timeout_s=config.cluster.collective_timeout_s,
        record_scores_every=config.balance.record,
        faults=planned_faults(os.environ),
    )


def balance_of(config: TrainConfig) -> BalanceConfig:
    """The settings of the run's law. `horizon`, of laws whose rate depends on it, is run.steps by default."""
    balance = config.balance.law_config
    return replace(balance, horizon=balance.horizon or config.run.steps) if balance.needs_horizon else balance


@contextmanager
def open_gang(
    config: ClusterConfig, spec: WorkerSpec, *, coordinated: bool = True, sizes: Sequence[int] = ()
) -> Iterator[LaunchedGang]:
    """Start or join Ray, start the coordinator and the workers, and end what was started.

    sizes: numbers of workers to try, the largest first; by default `num_workers` alone.

    Raises:
        ClusterUnreachable, ClusterTooSmall, GangFailed: see `RaySession.open` and `Gang.launch`.
    """
    # Imported here: importing Ray takes half a second, for which --help and refused options should not wait.
    import ray

    from cluster.gang.gang import Gang
    from cluster.ray.session import RaySession
    from runtime.job.coordinator import CoordinatorClient, start_coordinator

    with RaySession.open(config) as session:
        coordinator = start_coordinator(spec.run_id, spec.balance.module) if coordinated else None
        if coordinator is not None:
            spec = replace(spec, call_coordinator=CoordinatorClient(coordinator, config.coordinator_timeout_s))
        with Gang.launch(config, worker_maker(spec), sizes=sizes, ep_size_of=spec.parallel.ep_size_of) as gang:
            try:
                yield LaunchedGang(gang, coordinator, session.open_s, gang.startup_s["total"])
            finally:
                if coordinator is not None and gang.ray_watch.can_be_asked():
                    ray.kill(coordinator)  # On a joined cluster it would live as long as this process.


def runs_in_process(config: ClusterConfig) -> bool:
    """Whether `open_ranks` needs no other process."""
    return config.num_workers == 1 and config.address is None


@contextmanager
def open_ranks(config: ClusterConfig, spec: WorkerSpec) -> Iterator[Ranks]:
    """Ranks for work without a coordinator: one rank in this process for one local worker, else a gang."""
    if not runs_in_process(config):
        with open_gang(config, spec, coordinated=False) as launched:
            yield launched.gang
        return
    from torch._C._distributed_c10d import HashStore  # torch.distributed hides it from type checkers

    worker = worker_maker(spec)()
    worker.join(rank=0, world_size=1, store=HashStore(), timeout_s=config.collective_timeout_s)
    try:
        yield _InProcess(worker)
    finally:
        worker.leave()


def worker_maker(spec: WorkerSpec) -> Callable[[], "Worker"]:
    """A function for an actor to call, which builds the worker. Only that call imports the worker's code, and torch."""

    def make_worker() -> "Worker":
        from workers.worker import Worker

        return Worker(spec)

    return make_worker


@dataclass(frozen=True)
class _InProcess:
    worker: "Worker"

    def run(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.worker, method)(*args)]
