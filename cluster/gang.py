"""The gang: one actor a rank, in a stable order, joined by a store on rank 0, watched, and ended together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.placement import node_of_ranks, rank_order, reserve, threads_of
from cluster.session import forwarded_environment
from cluster.watch import Member, call_all, control, wait_for_stacks
from workers.actor import CONTROL_GROUP, JoinsGang, Place, WorkerActor

STOP_S = 5.0  # For killed processes to be gone.


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """One row of the rank map."""

    rank: int
    ip: str
    node_id: str
    gpu_ids: tuple[int, ...]
    pid: int
    num_threads: int
    interface: str
    transport: Mapping[str, str]

    @property
    def device(self) -> str:
        return "cuda " + ",".join(map(str, self.gpu_ids)) if self.gpu_ids else "cpu"


class Gang:
    """All ranks of a run. Use it as a context manager, or call `stop`: nothing of it outlives that.

    `rank_map` says where each rank lives, `startup_s` where the time to start went.
    """

    def __init__(self, config: ClusterConfig, group: PlacementGroup, ep_size: int = 1) -> None:
        self._config = config
        self._ep_size = ep_size
        self._group: PlacementGroup | None = group
        self._members: list[Member] = []
        self.rank_map: tuple[RankPlace, ...] = ()
        self.startup_s: dict[str, float] = {}

    @classmethod
    def launch(
        cls,
        config: ClusterConfig,
        make_worker: Callable[[], JoinsGang],
        env: Mapping[str, str] | None = None,
        *,
        ep_size: int = 1,
    ) -> Gang:
        """Place the actors, start all at once, and join them into one world.

        Args:
            make_worker: called without arguments in each actor, after `env` is set there. It travels by pickle: a
                function that imports torch inside spares the driver that import.
            env: variables for the workers, over the forwarded ones of the driver.
            ep_size: neighbouring ranks that shall share a machine where they fit (`rank_order`).
        Raises:
            ClusterTooSmall: the workers do not fit.
            GangFailed: a rank failed to start or to join, or `start_timeout_s` passed.
        """
        begun = time.monotonic()
        group = reserve(config)
        gang = cls(config, group, ep_size)
        try:
            gang.startup_s["place"] = time.monotonic() - begun
            gang._start(group, make_worker, forwarded_environment() | dict(env or {}))
        except BaseException:  # Ctrl-C included: no actor may outlive a failed launch.
            gang.stop()
            raise
        gang.startup_s["total"] = time.monotonic() - begun
        return gang

    @property
    def world_size(self) -> int:
        return len(self._members)

    def run(
        self,
        method: str,
        *args: Any,
        poll_s: float = 0.2,
        on_poll: Callable[[], None] | None = None,
        limit_s: float = math.inf,
    ) -> list[Any]:
        """Call a method of every rank's worker and return the results by rank.

        Args:
            on_poll: called about every `poll_s` on this thread while the ranks work, for a live view and for Ctrl-C;
                it may use `control`.
        Raises:
            GangFailed: with the first cause; the gang is stopped then, since the ranks no longer agree on anything.
        """
        calls = [member.actor.call.remote(method, *args) for member in self._members]
        try:
            return call_all(self._members, method, calls, poll_s=poll_s, on_poll=on_poll, limit_s=limit_s)
        except Exception:
            self.stop()
            raise

    def control(self, rank: int, method: str, *args: Any, timeout_s: float = 5.0) -> Any:
        """Call a quick method of one rank's worker, also while `run` is busy.

        Raises:
            WorkerUnreachable: no answer within `timeout_s`.
            GangFailed: the method raised.
        """
        return control(self._members[rank], method, *args, timeout_s=timeout_s)

    def stop(self) -> None:
        """End all actors and give their place back. Waits until they are gone, at most STOP_S; may be repeated."""
        group, self._group = self._group, None
        if group is None or not ray.is_initialized():
            return
        for member in self._members:
            ray.kill(member.actor)
        # A call to a dead actor ends in an error: when all have, the processes are gone and their memory is free.
        wait_for_stacks(self._members, STOP_S)
        remove_placement_group(group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, group: PlacementGroup, make_worker: Callable[[], JoinsGang], env: dict[str, str]) -> None:
        begun = time.monotonic()
        limit_s = self._config.start_timeout_s
        pickled: bytes = cloudpickle.dumps(make_worker)
        # Until the ranks are known, a member's rank is its bundle. All are created before any is waited for.
        self._members = [
            Member(rank=bundle, actor=_create_actor(group, bundle, env, pickled))
            for bundle in range(self._config.num_workers)
        ]
        starts = [member.actor.start.remote() for member in self._members]
        places: list[Place] = call_all(self._members, "start", starts, limit_s=limit_s)
        self.startup_s["processes and imports"] = time.monotonic() - begun
        self._assign_ranks(places)
        self._join(limit_s)

    def _assign_ranks(self, places: list[Place]) -> None:
        threads = threads_of(places, self._config.threads_per_worker)
        actors = [member.actor for member in self._members]
        order = rank_order(places, self._ep_size)
        self._members = [
            Member(rank=rank, actor=actors[bundle], ip=places[bundle].ip, pid=places[bundle].pid)
            for rank, bundle in enumerate(order)
        ]
        self.rank_map = tuple(
            RankPlace(
                rank=rank,
                ip=places[bundle].ip,
                node_id=places[bundle].node_id,
                gpu_ids=places[bundle].gpu_ids,
                pid=places[bundle].pid,
                num_threads=threads[bundle],
                interface=places[bundle].interface,
                transport=places[bundle].transport,
            )
            for rank, bundle in enumerate(order)
        )

    def _join(self, limit_s: float) -> None:
        begun = time.monotonic()
        leader = self._members[0]
        # The store lives on a placed worker: the head node may be one that ranks cannot reach.
        [address] = call_all([leader], "open_store", [leader.actor.open_store.remote()], limit_s=limit_s)
        timeout_s = self._config.collective_timeout_s
        nodes = node_of_ranks([row.ip for row in self.rank_map])
        joins = [
            member.actor.join.remote(row.rank, nodes, address, 0, timeout_s, row.num_threads)
            for member, row in zip(self._members, self.rank_map, strict=True)
        ]
        call_all(self._members, "join", joins, limit_s=limit_s)
        self.startup_s["join"] = time.monotonic() - begun


def _create_actor(
    group: PlacementGroup, bundle: int, env: dict[str, str], pickled_make_worker: bytes
) -> ActorHandle[WorkerActor]:
    demand = group.bundle_specs[bundle]
    actor_class = cast("Any", ray.remote)(concurrency_groups={CONTROL_GROUP: 1})(WorkerActor)
    actor: ActorHandle[WorkerActor] = actor_class.options(
        num_cpus=demand["CPU"],
        num_gpus=demand.get("GPU", 0),
        max_restarts=0,  # A rank that Ray restarted by itself would wait for a world that is gone.
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    ).remote(env, pickled_make_worker)
    return actor
