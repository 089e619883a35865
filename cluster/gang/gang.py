"""The gang: one actor a rank, in a stable order, joined through Ray's calls, watched, and ended together."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.failures.activity_watch import Answers, training_activities
from cluster.failures.calls import call_all, control, succeeded
from cluster.failures.errors import GangFailed
from cluster.failures.kill import kill_process
from cluster.failures.member import Member
from cluster.failures.stacks import wait_for_stacks
from cluster.gang.placement import ClusterTooSmall, RankPlace, node_of_ranks, rank_places, reserve
from cluster.ray.ray_watch import RayWatch
from cluster.ray.session import forwarded_environment
from dispatch.diagnosis.activity import Activity
from workers.actor import JoinsGang, WorkerActor, WorkerLocation
from workers.distributed.mailbox import CONTROL_GROUP

STOP_S = 5.0  # Longest wait for killed processes to end.
# Longest wait for a kept process to end its call and to leave its process groups. It takes some ten milliseconds, since
# `abort` breaks its connections. Replacements start meanwhile.
LEAVE_S = 12.0


class Gang:
    """All ranks of a run. Use it as a context manager, or call `stop`, which ends all of its processes.

    Attributes:
        rank_map: where each rank runs, by rank.
        startup_s: seconds that each part of the last start took.
        ray_watch: knows whether Ray is alive. Every method that waits for ranks raises RayDied when it is not.
    """

    def __init__(
        self,
        config: ClusterConfig,
        make_worker: Callable[[], JoinsGang],
        env: Mapping[str, str],
        ep_size_of: Callable[[int], int],
    ) -> None:
        """Start nothing yet; use `launch`."""
        self._config = config
        self._env = dict(env)
        self._make_worker: bytes = cloudpickle.dumps(make_worker)
        self._ep_size_of = ep_size_of
        self._group: PlacementGroup | None = None
        # By index of the bundle, since ranks change when the gang is formed at another size. Members and rank map: by
        # rank.
        self._actors: dict[int, ActorHandle[WorkerActor]] = {}
        self._places: dict[int, WorkerLocation] = {}
        self._members: list[Member] = []
        self._epoch = -1  # rises with every `_join`
        self._answers: Answers = {}
        self.rank_map: tuple[RankPlace, ...] = ()
        self.startup_s: dict[str, float] = {}
        self.ray_watch = RayWatch.of_this_process()

    @classmethod
    def launch(
        cls,
        config: ClusterConfig,
        make_worker: Callable[[], JoinsGang],
        env: Mapping[str, str] | None = None,
        *,
        sizes: Sequence[int] = (),
        ep_size_of: Callable[[int], int] = lambda _: 1,
    ) -> Gang:
        """Place the actors, start all at once, and join them into one world.

        Args:
            make_worker: called without arguments in each actor, after `env` is set there. It travels by pickle: a
                function that imports torch inside spares the driver that import.
            env: variables for the workers, over the forwarded ones of the driver.
            sizes: numbers of workers to try, the largest first; by default `num_workers` alone.
            ep_size_of: gives, for a number of workers, the size of an expert-parallel group. `rank_order` keeps the
                ranks of such a group on one node where it can.
        Raises:
            ClusterTooSmall: the workers do not fit.
            GangFailed: a rank failed to start or to join, or `start_timeout_s` passed.
        """
        gang = cls(config, make_worker, forwarded_environment() | dict(env or {}), ep_size_of)
        try:
            gang.form(sizes or (config.num_workers,))
        except BaseException:  # Ctrl-C included: no actor may outlive a failed launch.
            gang.stop()
            raise
        return gang

    @property
    def world_size(self) -> int:
        return len(self._members)

    @property
    def is_placed(self) -> bool:
        """Whether the gang holds a placement group: false after `stop`, or when `form` found no capacity."""
        return self._group is not None

    @property
    def num_places(self) -> int:
        """Bundles of the placement group. A bundle lost with its node counts too: Ray places it again elsewhere."""
        return self._group.bundle_count if self._group else 0

    def num_living_places(self) -> int:
        """Bundles of the placement group that lie on living nodes."""
        if self._group is None:
            return 0
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sum(node in alive for node in placement_group_table(self._group)["bundles_to_node_id"].values())

    def run(
        self,
        method: str,
        *args: Any,
        poll_s: float = 0.2,
        on_poll: Callable[[], None] | None = None,
        on_ray_died: Callable[[], None] | None = None,
        limit_s: float = math.inf,
        keep: bool = False,
    ) -> list[Any]:
        """Call a method of every rank's worker and return the results by rank.

        Args:
            on_poll: called about every `poll_s` on this thread while the ranks work, for a live view and for Ctrl-C;
                it may use `control`.
            on_ray_died: asks the ranks to save and to end this call early. RayDied is raised once they have.
            limit_s: longest wait for the whole call.
            keep: leave the processes as they are after a failure, for `form_again` or `shrink`. By default the gang is
                stopped then, since its ranks may be in different steps.
        Raises:
            GangFailed: a rank failed; the first cause is the first of its `failures`.
        """
        self._answers = {}
        calls = [member.actor.call.remote(method, *args) for member in self._members]
        try:
            return self._call_all(
                self._members,
                method,
                calls,
                poll_s=poll_s,
                on_poll=on_poll,
                on_ray_died=on_ray_died,
                limit_s=limit_s,
                bound_s=self._config.collective_timeout_s,
                answers=self._answers,
            )
        except Exception:
            if not keep:
                self.stop()
            raise

    def seen(self) -> dict[int, tuple[Activity, float]]:
        """By rank, the activity of the training thread in the last answer during `run`, and that answer's age in s."""
        return training_activities(self._answers)

    def control(self, rank: int, method: str, *args: Any, timeout_s: float = 5.0) -> Any:
        """Call a quick method of one rank's worker, also while `run` is busy.

        Raises:
            WorkerUnreachable: no answer within `timeout_s`.
            GangFailed: the method raised.
        """
        return control(self._members[rank], method, *args, timeout_s=timeout_s)

    def form(self, sizes: Sequence[int]) -> None:
        """Reserve a new placement group, start new processes in it, and join them.

        Their number is the first of `sizes` (the largest first) that the cluster can hold.

        Raises:
            ClusterTooSmall: not even the last size fits.
            GangFailed: a rank failed to start or to join, or `start_timeout_s` passed.
        """
        self.stop()
        begun = time.monotonic()
        self._group = self._reserve(sizes)
        self.startup_s = {"place": time.monotonic() - begun}
        limit_s = self._config.start_timeout_s
        # All actors are created before any is waited for: they import torch, which takes seconds, at the same time.
        self._await_starts({bundle: self._restart(bundle) for bundle in range(self._group.bundle_count)}, limit_s)
        self._join(limit_s)
        self.startup_s["total"] = time.monotonic() - begun

    def form_again(self, failed: GangFailed, limit_s: float) -> None:
        """After `run(keep=True)` failed: replace the lost processes in their bundles, and join all ranks anew.

        A process is kept only if its last call has returned and it has left its process groups: then no collective of
        the epoch before can still run in it. On cuda none is kept: it has not been shown that a process can always
        leave its NCCL groups after a failure.

        Raises:
            GangFailed: a replacement did not start within `limit_s`, or a rank failed to join.
        """
        begun = time.monotonic()
        self._kill_silent(failed)
        kept = self._kept_bundles(failed)
        # Replacements take seconds to start, so they begin before the others are asked to leave.
        starting = {bundle: self._restart(bundle) for bundle in set(self._actors) - set(kept)}
        starting |= {bundle: self._restart(bundle) for bundle in set(kept) - set(self._leave(kept))}
        self.startup_s = {"leave": time.monotonic() - begun}
        self._await_starts(starting, limit_s)
        self._join(self._config.start_timeout_s)
        self.startup_s["total"] = time.monotonic() - begun

    def shrink(self, failed: GangFailed, world_size: int) -> None:
        """After `run(keep=True)` failed: go on with `world_size` of the processes that `form_again` would keep.

        They keep their checkpoints in memory. If fewer are left, a new gang of that size is formed.

        Raises:
            ClusterTooSmall, GangFailed: as `form`.
        """
        begun = time.monotonic()
        self._kill_silent(failed)
        kept = self._kept_bundles(failed)
        for bundle in set(self._actors) - set(kept):
            self._end(bundle)
        kept = self._leave(kept)[:world_size]
        if len(kept) < world_size:
            self.form((world_size,))
            return
        for bundle in set(self._actors) - set(kept):
            self._end(bundle)
        self.startup_s = {"leave": time.monotonic() - begun}
        self._assign_ranks()
        self._join(self._config.start_timeout_s)
        self.startup_s["total"] = time.monotonic() - begun

    def stop(self) -> None:
        """End all actors and remove the placement group. Waits until they are gone, at most STOP_S; may be repeated."""
        group, self._group = self._group, None
        actors, self._actors, self._places = self._actors, {}, {}
        if group is None or not ray.is_initialized():
            return
        if not self.ray_watch.can_be_asked():
            return  # Every call below would block. The actors end with Ray's processes, or with the driver.
        for actor in actors.values():
            ray.kill(actor)
        # `ray.kill` returns at once. A call to a dead actor ends in an error: when all have ended, the processes are
        # gone and their memory is free for the next gang.
        wait_for_stacks([Member(rank=bundle, actor=actor) for bundle, actor in actors.items()], STOP_S)
        remove_placement_group(group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _reserve(self, sizes: Sequence[int]) -> PlacementGroup:
        *larger, smallest = sizes
        for size in larger:
            wait_s = self._config.replace_timeout_s
            with contextlib.suppress(ClusterTooSmall):
                return reserve(replace(self._config, num_workers=size, start_timeout_s=wait_s), self.ray_watch.check)
        return reserve(replace(self._config, num_workers=smallest), self.ray_watch.check)

    def _call_all(
        self, members: Sequence[Member], method: str, calls: Sequence[ray.ObjectRef[Any]], **options: Any
    ) -> list[Any]:
        return call_all(members, method, calls, check_ray=self.ray_watch.check, **options)

    def _kill_silent(self, failed: GangFailed) -> None:
        for failure in failed.failures:
            # In `start` no process of a silent rank is known. Others may be stopped: see `kill_process`.
            if failure.kind == "silent" and failed.method != "start":
                kill_process(self.rank_map[failure.rank])

    def _kept_bundles(self, failed: GangFailed) -> list[int]:
        """Bundles of the processes that may join again, in rank order: neither dead, nor silent, nor blamed for a hang.

        A process that still runs may wait in a collective for a lost one. Its call fails once the lost process is
        killed; if that takes longer than LEAVE_S, `_leave` does not return its bundle.
        """
        if any(place.gpu_ids for place in self._places.values()):
            return []
        # When `start` failed, the numbers in `failures` are bundles, not ranks; a process that did not start has no
        # entry in `_places`.
        lost = {failure.rank for failure in failed.failures if failure.kind not in ("error", "running")}
        kept = [place.bundle for place in self.rank_map if failed.method == "start" or place.rank not in lost]
        return [bundle for bundle in kept if bundle in self._places]

    def _leave(self, bundles: Sequence[int]) -> list[int]:
        """Have these processes leave their process groups; returns those that did, in the same order."""
        # `abort` and `close` run on the control thread, beside a call that still runs. They break its connections, and
        # its waits for the store of this epoch. So a rank that waits for a lost one fails at once, and reaches `leave`.
        for bundle in bundles:
            self._actors[bundle].control.options(concurrency_group=CONTROL_GROUP).remote("abort")
            self._actors[bundle].mailbox.options(concurrency_group=CONTROL_GROUP).remote("close", self._epoch)
        calls: dict[int, Any] = {bundle: self._actors[bundle].call.remote("leave") for bundle in bundles}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=LEAVE_S)
        return [bundle for bundle, call in calls.items() if succeeded(call)]

    def _restart(self, bundle: int) -> ray.ObjectRef[Any]:
        """Replace the process of a bundle; returns the new one's call of `start`."""
        self._end(bundle)
        if self._group is None:
            raise RuntimeError("the gang was stopped")
        self._actors[bundle] = _create_actor(self._group, bundle, self._env, self._make_worker)
        call: ray.ObjectRef[Any] = self._actors[bundle].start.remote()
        return call

    def _end(self, bundle: int) -> None:
        self._places.pop(bundle, None)
        if bundle in self._actors:
            ray.kill(self._actors.pop(bundle))

    def _await_starts(self, starting: dict[int, ray.ObjectRef[Any]], limit_s: float) -> None:
        begun = time.monotonic()
        # Ranks are known only when all have started; until then a member's rank is the index of its bundle.
        members = [Member(rank=bundle, actor=self._actors[bundle]) for bundle in starting]
        places: list[WorkerLocation] = self._call_all(members, "start", list(starting.values()), limit_s=limit_s)
        self._places |= dict(zip(starting, places, strict=True))
        self.startup_s["processes and imports"] = time.monotonic() - begun
        self.startup_s["of these imports"] = max((place.import_s for place in places), default=0.0)
        self._assign_ranks()

    def _assign_ranks(self) -> None:
        ep_size = self._ep_size_of(len(self._places))
        self.rank_map = rank_places(self._places, ep_size, self._config.threads_per_worker)
        self._members = [
            Member(
                rank=place.rank,
                actor=self._actors[place.bundle],
                ip=place.ip,
                pid=place.pid,
                device=place.device,
                node_id=place.node_id,
                stack_file=place.stack_file,
            )
            for place in self.rank_map
        ]

    def _join(self, limit_s: float) -> None:
        begun = time.monotonic()
        self._epoch += 1  # Messages of the gang before carry its lower epoch, and are refused.
        timeout_s = self._config.collective_timeout_s
        nodes = node_of_ranks([place.ip for place in self.rank_map])
        actors = [member.actor for member in self._members]
        joins = [
            actor.join.remote(place.rank, nodes, actors, self._epoch, timeout_s, place.num_threads)
            for actor, place in zip(actors, self.rank_map, strict=True)
        ]
        self._call_all(self._members, "join", joins, limit_s=limit_s)
        self.startup_s["join"] = time.monotonic() - begun


def _create_actor(
    group: PlacementGroup, bundle: int, env: dict[str, str], pickled_make_worker: bytes
) -> ActorHandle[WorkerActor]:
    demand = group.bundle_specs[bundle]
    # A concurrency group has threads of its own: the actor answers control calls while `train` runs for hours.
    actor_class = cast("Any", ray.remote)(concurrency_groups={CONTROL_GROUP: 1})(WorkerActor)
    actor: ActorHandle[WorkerActor] = actor_class.options(
        num_cpus=demand["CPU"],
        num_gpus=demand.get("GPU", 0),
        max_restarts=0,  # The supervisor replaces it: all ranks have to join again when one is new.
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    ).remote(env, pickled_make_worker)
    return actor
