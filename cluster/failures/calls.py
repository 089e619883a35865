"""Waits for one call on every rank; if the gang fails, tells the cause from its consequences."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from cluster.failures.activity_watch import ANSWER_S, ActivityWatch, Answers
from cluster.failures.errors import GangFailed, WorkerFailure, WorkerUnreachable, cause_first
from cluster.failures.member import Member
from cluster.failures.stacks import stacks_of, wait_for_stacks
from cluster.failures.stall import Stall
from cluster.ray.ray_watch import RayDied
from workers.actor import Failure
from workers.distributed.mailbox import CONTROL_GROUP

# After a first failure: long enough for the other ranks' reports and for Ray's own of a death (0.05 s here) to arrive.
GRACE_S = 1.0
# After the first sign that Ray has died, for a last step and its checkpoint. Ray's client aborts the driver after 60 s,
# and closing takes some seconds.
SAVED_BY_S = 40.0
SURE = 0.9  # A wait that ended in a time-out of torch, whose clock started a moment later, lasted at least this much.


def call_all(
    members: Sequence[Member],
    method: str,
    calls: Sequence[ray.ObjectRef[Any]],
    *,
    poll_s: float = 0.2,
    on_poll: Callable[[], None] | None = None,
    check_ray: Callable[[], None] = lambda: None,
    on_ray_died: Callable[[], None] | None = None,
    limit_s: float = math.inf,
    bound_s: float = math.inf,
    answers: Answers | None = None,
) -> list[Any]:
    """Wait for `calls`, one for each member, and return their results by rank.

    Calls `on_poll` about every `poll_s` while it waits; a WorkerUnreachable from it is left to this watch to explain.
    `check_ray` is called as often and raises RayDied. Where `on_ray_died` makes the ranks end their calls, they get
    until SAVED_BY_S for that: they may outlive Ray, and what they made need not be lost. `answers` gets what each rank
    says that it is in, where `bound_s` is finite.

    Raises:
        RayDied: from `check_ray`.
        GangFailed: a rank died or raised, `limit_s` passed, or a collective lasted longer than `bound_s`; within a few
            seconds of it, whatever the other ranks do.
    """
    watch = ActivityWatch(members, bound_s, answers) if math.isfinite(bound_s) else None
    stall: Stall | None = None
    pending = dict(zip(calls, members, strict=True))
    results: dict[int, Any] = {}
    failures: list[WorkerFailure] = []
    deadline = time.monotonic() + limit_s
    ray_check = _RayCheck(check_ray, on_ray_died)
    while pending and stall is None and time.monotonic() < deadline:
        deadline = min(deadline, ray_check.look())
        done, _ = ray.wait(list(pending), timeout=poll_s)
        for call in done:
            member = pending.pop(call)
            outcome = _outcome(member, call)
            if not isinstance(outcome, WorkerFailure):
                results[member.rank] = outcome
                continue
            if not failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
            failures.append(outcome)
        if watch is not None and not failures:
            stall = watch.look()
        # A rank that hangs must not hold up the watch in a call that waits for it.
        if on_poll is not None and not failures and (watch is None or watch.all_answer):
            _poll(on_poll)
    ray_check.end()
    if failures or pending:
        if watch is not None and stall is None and failures and all(failure.collateral for failure in failures):
            stall = watch.judge(SURE * bound_s)
        if stall is None:
            rest = _fate_of_the_rest(list(pending.values()), limit_s)
            raise GangFailed(method, _with_last_words(cause_first([*failures, *rest]), watch))
        raise GangFailed(method, _held_up(stall, members, failures, pending))
    return [results[member.rank] for member in members]


class _RayCheck:
    """When Ray dies, gives the ranks time to end their calls where they can be told to, then raises RayDied."""

    def __init__(self, check_ray: Callable[[], None], on_ray_died: Callable[[], None] | None) -> None:
        self._check, self._tell = check_ray, on_ray_died
        self._died: RayDied | None = None
        self._deadline = math.inf

    def look(self) -> float:
        """Check on Ray. Returns the deadline for all calls: infinity while Ray lives."""
        if self._died is None:
            try:
                self._check()
            except RayDied as died:
                if self._tell is None:
                    raise
                self._died, self._deadline = died, died.since + SAVED_BY_S
                _poll(self._tell)
        return self._deadline

    def end(self) -> None:
        """Raise RayDied if Ray died, however the calls ended: that is no failure of a rank."""
        if self._died is not None:
            raise self._died


def _held_up(
    stall: Stall,
    members: Sequence[Member],
    failures: Sequence[WorkerFailure],
    pending: Mapping[ray.ObjectRef[Any], Member],
) -> tuple[WorkerFailure, ...]:
    """Describe every rank when a collective did not end: the ranks to blame first."""
    blamed = stall.missing or stall.waiting[:1]
    text = f"CollectiveTimeout: {stall.error}"
    stacks = stacks_of([member for member in members if member.rank in blamed], stall.silent, ANSWER_S)
    # Where the wait of a blamed rank has ended too, it runs nothing any more: its own error says where it was.
    stacks |= {each.rank: each.trace for each in (*failures, *_ended(pending)) if each.rank in blamed and each.trace}
    hung = [
        member.failed(
            "silent" if member.rank in stall.silent else "hung", text, error=stall.error, trace=stacks[member.rank]
        )
        for member in members
        if member.rank in blamed
    ]
    # Ranks that did not answer a moment ago are not asked again: that would take as long once more.
    others = [member for member in pending.values() if member.rank not in blamed]
    silent = [member.failed("silent", "does not answer") for member in others if member.rank in stall.silent]
    rest = [member for member in others if member.rank not in stall.silent]
    returned = [failure for failure in failures if failure.rank not in blamed]
    return (*hung, *cause_first([*returned, *silent, *_fate_of_the_rest(rest, math.inf)]))


def _ended(pending: Mapping[ray.ObjectRef[Any], Member]) -> list[WorkerFailure]:
    """Failures of pending calls that have ended since the last look."""
    done = ray.wait(list(pending), num_returns=len(pending), timeout=0)[0] if pending else []
    outcomes = [_outcome(pending[call], call) for call in done]
    return [outcome for outcome in outcomes if isinstance(outcome, WorkerFailure)]


def _with_last_words(failures: tuple[WorkerFailure, ...], watch: ActivityWatch | None) -> tuple[WorkerFailure, ...]:
    """Add to a process's death how far the gang was, by the account of the others: the dead one cannot tell."""
    first, *rest = failures
    if first.kind != "died" or watch is None:
        return failures
    words = watch.last_seen(first.rank) + watch.places()
    return (replace(first, message=f"{first.message}{words}"), *rest)


def _poll(on_poll: Callable[[], None]) -> None:
    with contextlib.suppress(WorkerUnreachable):  # If it died, its call ends in an error too, which names the cause.
        on_poll()


def _outcome(member: Member, call: ray.ObjectRef[Any]) -> Any:
    """The call's result, or a WorkerFailure."""
    try:
        value = ray.get(call)
    except RayActorError as error:
        return member.failed("died", _text_of_death(error), time_s=time.time())
    except Exception as error:  # noqa: BLE001 The process boundary: such as a result that does not unpickle here.
        return member.failed("error", f"{type(error).__name__}: {error}", time_s=time.time())
    if not isinstance(value, Failure):
        return value
    return member.failed(
        "error",
        value.message,
        trace=value.trace,
        collateral=value.collateral,
        time_s=value.time_s,
        error=value.error,
    )


def _text_of_death(error: RayActorError) -> str:
    # Ray says first that it died, then repeats name, id and address, which rank and pid say better; after the reason it
    # lists what might have caused it.
    _, *lines = str(error).splitlines()
    reasons = [line.strip() for line in lines if "died" in line or "exit" in line or "reason" in line]
    return "its process died: " + (" ".join(reasons).partition(". Some common causes")[0] or str(error))


def _fate_of_the_rest(members: Sequence[Member], limit_s: float) -> list[WorkerFailure]:
    """Ask the ranks whose call has not returned for their stacks. A stopped or cut-off rank does not answer."""
    limit = f" after {limit_s:g} s" if math.isfinite(limit_s) else ""
    fates = []
    for member, answer in zip(members, wait_for_stacks(members, ANSWER_S), strict=True):
        trace = None if answer is None else _outcome(member, answer)
        if trace is None:
            state = "does not answer" if member.pid else "has not started"
            fates.append(member.failed("silent", f"{state}{limit}: it was stopped, or its node is slow or cut off"))
        elif isinstance(trace, WorkerFailure):
            fates.append(trace)
        else:
            fates.append(member.failed("running", f"was still running{limit}", trace=trace))
    return fates


def left(call: ray.ObjectRef[Any]) -> bool:
    """Whether a call has ended without an error."""
    try:
        return not isinstance(ray.get(call, timeout=0), Failure)
    except RayError:
        return False


def control(member: Member, method: str, *args: Any, timeout_s: float) -> Any:
    """Call a quick method of one rank's worker while a long one runs.

    Raises:
        WorkerUnreachable: no answer within `timeout_s`, or the worker is gone.
        GangFailed: the method raised.
    """
    call: Any = member.actor.control.options(concurrency_group=CONTROL_GROUP).remote(method, *args)
    try:
        value = ray.get(call, timeout=timeout_s)
    except (RayActorError, GetTimeoutError) as error:
        where = f"rank {member.rank} ({member.ip}, pid {member.pid})"
        raise WorkerUnreachable(f"{where} did not answer {method} within {timeout_s:g} s") from error
    except RayError as error:
        raise GangFailed(method, (member.failed("error", str(error), time_s=time.time()),)) from error
    if isinstance(value, Failure):
        outcome = member.failed("error", value.message, trace=value.trace, time_s=value.time_s, error=value.error)
        raise GangFailed(method, (outcome,)) from value.error
    return value
