"""Keeps a run going: lets the gang train, recovers it from failures, and grows it when the cluster has room.

`cluster.failures` detects the failures, and `policy.decide` chooses what to do about one.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from cluster.config import ClusterConfig
from cluster.failures.errors import MAX_DIAGNOSIS_CHARS, GangFailed
from cluster.gang.capacity import CapacityRequest, draining_nodes, num_workers_that_fit, preempted_nodes
from cluster.gang.gang import Gang
from cluster.gang.placement import ClusterTooSmall
from cluster.gang.policy import Decision, GiveUp, Resize, Restart, Retry, cause_of, decide
from dispatch.errors import UserError

POLL_S = 0.2
DRAIN_CHECK_EVERY_S = 5.0  # Clouds announce that they take a node back 30 s before or earlier.


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How the gang was formed again.

    since: Unix time at which the attempt before failed or stopped. seconds: what each part of the recovery took.
    """

    since: float
    seconds: dict[str, float]


class Job(Protocol):
    """What a supervisor keeps going and reports to. `runtime.job.training_job` implements it."""

    def prepare_attempt(self, gang: Gang, recovery: Recovery | None) -> tuple[Any, ...]:
        """Get ready to go on from the newest state, and return the arguments of the workers' method `train` for that.

        After a failure all ranks are asked for their checkpoints in memory, and write the newest one to the disk if it
        is newer than those there. recovery: None in the first attempt.

        Raises:
            GangFailed: a rank failed meanwhile.
        """
        ...

    def saved_step(self) -> int:
        """Step of the newest checkpoint, -1 without one."""
        ...

    def on_poll(self, gang: Gang) -> None:
        """Called about every POLL_S while the gang trains."""
        ...

    def is_over(self, results: list[Any]) -> bool:
        """Whether these results, by rank, end the job. False if the gang only stopped to be resized."""
        ...

    def stop_requested(self) -> bool:
        """Whether the user asked for a stop."""
        ...

    def tell(self, event: str, **details: Any) -> None:
        """Record that something happened."""
        ...


class GaveUp(UserError, RuntimeError):
    """The gang failed again and again, or no longer fits on the cluster. `failures`: every failure, oldest first."""

    def __init__(self, reason: str, failures: tuple[GangFailed | ClusterTooSmall, ...]) -> None:
        super().__init__(reason, failures)  # As given, so that it survives pickling.
        self.reason = reason
        self.failures = failures

    @property
    def is_bug(self) -> bool:
        """Whether the last failure is a bug, so that its traceback must be shown and reported."""
        return isinstance(self.failures[-1], GangFailed) and self.failures[-1].is_bug

    def __str__(self) -> str:
        *before, last = self.failures
        lines = [f"gave up: {self.reason}"]
        lines += [f"  {number}. {str(failure).splitlines()[0]}" for number, failure in enumerate(before, 1)]
        return "\n".join([*lines, f"  {len(self.failures)}. {last}"])


class Supervisor:
    """Runs `train` on a gang until the job is over.

    Args:
        gang: formed already; the caller stops it.
        sizes: numbers of workers that the job can have, the largest first.
    """

    def __init__(self, gang: Gang, job: Job, config: ClusterConfig, sizes: Sequence[int]) -> None:
        self._gang, self._job, self._config, self._sizes = gang, job, config, sizes
        self._world_size = gang.world_size
        self._failures: list[GangFailed | ClusterTooSmall] = []  # since the last progress
        self._history: list[Restart] = []
        self._pending_resize: Resize | None = None  # the gang was asked to save and stop for it
        self._capacity_request: CapacityRequest | None = None
        self._next_drain_check = self._next_growth_check = 0.0
        self._since = time.time()  # when the last attempt ended, Unix time
        self._downtime_s: dict[str, float] = {}  # since then, by part

    def run(self) -> list[Any]:
        """Train until the job is over; returns the results of `train` by rank, from the attempt that ended the job.

        Raises:
            GangFailed: the job itself raised an error, or the policy ended the run at its first failure.
            GaveUp: the policy ended the run at a later failure.
            RayDied: Ray itself has died, so no worker can be replaced.
        """
        decision: Decision | None = None
        try:
            while True:
                try:
                    results = self._attempt(decision)
                except (GangFailed, ClusterTooSmall) as failure:
                    decision = self._plan_recovery(failure)
                    continue
                if self._pending_resize is None or self._job.is_over(results):
                    return results
                decision, self._since, self._downtime_s = self._pending_resize, time.time(), {}
        finally:
            self._end_capacity_request()

    def _attempt(self, decision: Decision | None) -> list[Any]:
        """Form the gang as decided and train on it."""
        recovery = None
        if decision is not None:
            self._form(decision)
            recovery = Recovery(since=self._since, seconds=self._downtime_s | self._gang.startup_s)
        self._pending_resize = None
        self._request_capacity()
        arguments = self._job.prepare_attempt(self._gang, recovery)
        return self._gang.run(
            "train", *arguments, poll_s=POLL_S, on_poll=self._poll, on_ray_died=self._save_and_stop, keep=True
        )

    def _form(self, decision: Decision) -> None:
        self._end_capacity_request()  # The gang may need the bundles that it holds.
        before, failure = self._world_size, self._failures[-1] if self._failures else None
        if isinstance(decision, Resize):
            self._world_size = decision.world_size
        # After a planned resize, or where no place was found, there are no processes to keep.
        if decision is self._pending_resize or not isinstance(failure, GangFailed) or not self._gang.is_placed:
            self._gang.form((self._world_size,))
        elif isinstance(decision, Retry):
            # A run that may shrink does not wait as long for a replacement's place: it goes on with fewer workers.
            can_shrink = before > self._sizes[-1]
            self._gang.form_again(
                failure, self._config.replace_timeout_s if can_shrink else self._config.start_timeout_s
            )
        elif self._world_size < before:
            self._gang.shrink(failure, self._world_size)
        else:  # As many workers, but on other nodes than the one that is taken back.
            self._gang.form((self._world_size,))

    def _plan_recovery(self, failure: GangFailed | ClusterTooSmall) -> Decision:
        """Decide how to go on, record it, and wait for the back-off. Raises if the decision is to give up."""
        self._begin_downtime(failure)
        self._gang.ray_watch.wait_until_it_can_be_asked()
        saved_step = self._job.saved_step()
        if self._history and saved_step > self._history[-1].saved_step:
            self._failures = []
        self._failures.append(failure)
        cause = cause_of(failure, self._ranks_on(preempted_nodes())) if isinstance(failure, GangFailed) else "no room"
        self._job.tell("failed", cause=cause, **_details(failure))
        decision = decide(
            cause,
            saved_step=saved_step,
            world_size=self._world_size,
            capacity=num_workers_that_fit(self._config),
            sizes=self._sizes,
            history=self._history,
            max_restarts=self._config.max_restarts,
        )
        if isinstance(decision, GiveUp):
            self._give_up(decision, failure)
        self._history.append(Restart(cause=cause, saved_step=saved_step))
        self._tell_plan(decision)
        self._wait(decision.back_off_s)
        return decision

    def _begin_downtime(self, failure: GangFailed | ClusterTooSmall) -> None:
        now = time.time()
        noticed = failure.first.time_s if isinstance(failure, GangFailed) else 0.0
        self._since = min(noticed or now, now)  # a worker's clock may be ahead of ours
        self._downtime_s = {"others ended": now - self._since}

    def _ranks_on(self, nodes: Collection[str]) -> set[int]:
        return {row.rank for row in self._gang.rank_map if row.node_id in nodes}

    def _give_up(self, decision: GiveUp, failure: GangFailed | ClusterTooSmall) -> NoReturn:
        self._job.tell("gave_up", reason=decision.reason)
        if decision.own_error or len(self._failures) == 1:
            raise failure
        raise GaveUp(decision.reason, tuple(self._failures)) from failure

    def _tell_plan(self, decision: Retry | Resize) -> None:
        workers = decision.world_size if isinstance(decision, Resize) else self._world_size
        self._job.tell("recovering", workers=workers, workers_before=self._world_size, back_off_s=decision.back_off_s)

    def _wait(self, back_off_s: float) -> None:
        begun = time.monotonic()
        while time.monotonic() < begun + back_off_s and not self._job.stop_requested():
            time.sleep(POLL_S)
        self._downtime_s["back-off"] = time.monotonic() - begun

    def _poll(self) -> None:
        self._job.on_poll(self._gang)
        now = time.monotonic()
        is_due = now >= min(self._next_drain_check, self._next_growth_check)
        if not is_due or not self._gang.ray_watch.can_be_asked():
            return
        if self._pending_resize is None and now >= self._next_drain_check:
            self._next_drain_check = now + DRAIN_CHECK_EVERY_S
            self._leave_draining_nodes()
        if self._pending_resize is None and now >= self._next_growth_check:
            self._next_growth_check = now + self._config.grow_every_s
            if self._larger_sizes and self._has_capacity_for_more():
                self._stop_for_resize(self._larger_sizes[-1], "the cluster has room for more")

    @property
    def _larger_sizes(self) -> list[int]:
        """Sizes above the present one, the largest first. Growth takes the last one, the next step up."""
        return [size for size in self._sizes if size > self._world_size]

    def _request_capacity(self) -> None:
        now = time.monotonic()
        self._next_drain_check, self._next_growth_check = now + DRAIN_CHECK_EVERY_S, now + self._config.grow_every_s
        # A gang that shrank still holds all bundles of its placement group, and Ray places the lost ones again when a
        # node is back. Only bundles beyond those have to be asked for.
        if self._larger_sizes and self._gang.num_places < self._larger_sizes[-1]:
            self._capacity_request = CapacityRequest(self._config, self._larger_sizes[-1] - self._gang.num_places)

    def _has_capacity_for_more(self) -> bool:
        granted = self._capacity_request is None or self._capacity_request.granted()
        return granted and self._gang.num_living_places() >= min(self._larger_sizes[-1], self._gang.num_places)

    def _leave_draining_nodes(self) -> None:
        """Move to the other nodes while the draining ones still run.

        If the others hold too few workers, the gang trains on until the draining nodes end, and recovers then.
        """
        if self._ranks_on(draining_nodes()):
            capacity = num_workers_that_fit(self._config)
            if fitting := [size for size in self._sizes if size <= capacity]:
                self._stop_for_resize(fitting[0], "a node is being taken back")

    def _stop_for_resize(self, world_size: int, reason: str) -> None:
        """Have the gang save and stop, to go on with another number of workers or in another place."""
        self._save_and_stop()
        self._pending_resize = Resize(world_size=world_size)
        self._job.tell("moving", workers=world_size, workers_before=self._world_size, reason=reason)

    def _save_and_stop(self) -> None:
        self._gang.control(0, "request_stop")

    def _end_capacity_request(self) -> None:
        request, self._capacity_request = self._capacity_request, None
        if request is not None and self._gang.ray_watch.can_be_asked():
            request.end()


def _details(failure: GangFailed | ClusterTooSmall) -> dict[str, Any]:
    text = str(failure)
    details: dict[str, Any] = {"reason": text.splitlines()[0]}
    if isinstance(failure, ClusterTooSmall):
        return details
    first = failure.first
    details |= {"rank": first.rank, "node": first.ip, "pid": first.pid, "kind": first.kind}
    # The whole text, although the run may recover: the stacks and the traceback are needed to find the cause later.
    return {**details, "diagnosis": text[:MAX_DIAGNOSIS_CHARS]}
