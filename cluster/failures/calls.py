"""Detects failures of a gang, by one call on every rank, and tells the rank that caused one from those that follow."""

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

# Wait after the first failure, so that the failures of other ranks arrive too. The first to arrive need not be the
# cause: Ray reports a death after 0.05 s (measured on one machine), and peers may see its broken connections before.
GRACE_S = 1.0
# Time from the first sign that Ray has died, for the ranks to make a last step and save it. It must end well before
# Ray's client aborts the driver, which is after 60 s, and closing the run takes some seconds.
SAVED_BY_S = 40.0
# A wait of at least this share of the bound counts as overdue where torch's own time-out, which is the same bound, has
# ended it: torch and the activity of a rank begin to count at different moments.
TIMED_OUT_SHARE = 0.9


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

    Args:
        on_poll: called about every `poll_s` while all ranks answer. A WorkerUnreachable that it raises is ignored,
            since the call of that rank in `calls` fails too.
        check_ray: called about every `poll_s`; raises RayDied.
        on_ray_died: asks the ranks to save and to end their calls. They get SAVED_BY_S for that, since workers may
            outlive Ray. Without it RayDied is raised at once.
        limit_s: longest wait for all calls.
        bound_s: longest wait of one collective. The ranks are asked for their activity only if it is finite.
        answers: receives the last answer of each rank.
    Raises:
        RayDied: from `check_ray`.
        GangFailed: a rank died or raised, `limit_s` passed, or a collective lasted longer than `bound_s`. It is raised
            a few seconds later at most, whatever the other ranks do.
    """
    watch = ActivityWatch(members, bound_s, {} if answers is None else answers) if math.isfinite(bound_s) else None
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
        # `on_poll` calls rank 0 and waits for its answer: if that hangs, no stall would be looked for meanwhile.
        if on_poll is not None and not failures and (watch is None or watch.all_answer):
            _poll(on_poll)
    ray_check.end()
    if failures or pending:
        # If all failures only lost a connection or timed out, the cause may be a rank that hangs and has not failed.
        if watch is not None and stall is None and failures and all(failure.collateral for failure in failures):
            stall = watch.judge(TIMED_OUT_SHARE * bound_s)
        if stall is None:
            unfinished = _failures_of_unfinished(list(pending.values()), limit_s)
            raise GangFailed(method, _with_last_activity(cause_first([*failures, *unfinished]), watch))
        raise GangFailed(method, _failures_of_stall(stall, members, failures, pending))
    return [results[member.rank] for member in members]


class _RayCheck:
    """Handles the death of Ray: gives the ranks time to save and end their calls, then raises RayDied."""

    def __init__(self, check_ray: Callable[[], None], on_ray_died: Callable[[], None] | None) -> None:
        self._check, self._on_ray_died = check_ray, on_ray_died
        self._died: RayDied | None = None
        self._deadline = math.inf

    def look(self) -> float:
        """Check on Ray. Returns the deadline for all calls: infinity while Ray lives."""
        if self._died is None:
            try:
                self._check()
            except RayDied as died:
                if self._on_ray_died is None:
                    raise
                self._died, self._deadline = died, died.since + SAVED_BY_S
                _poll(self._on_ray_died)
        return self._deadline

    def end(self) -> None:
        """Raise RayDied if Ray died, however the calls ended: no rank is to blame for it."""
        if self._died is not None:
            raise self._died


def _failures_of_stall(
    stall: Stall,
    members: Sequence[Member],
    failures: Sequence[WorkerFailure],
    pending: Mapping[ray.ObjectRef[Any], Member],
) -> tuple[WorkerFailure, ...]:
    """Describe every rank that did not return its result when a collective stalled: the ranks to blame first."""
    blamed = stall.missing or stall.waiting[:1]
    text = f"CollectiveTimeout: {stall.error}"
    stacks = stacks_of([member for member in members if member.rank in blamed], stall.silent, ANSWER_S)
    # A blamed rank whose call has failed meanwhile runs nothing any more. The trace of its error says where it was.
    stacks |= {each.rank: each.trace for each in (*failures, *_ended(pending)) if each.rank in blamed and each.trace}
    hung = [
        member.failed(
            "silent" if member.rank in stall.silent else "hung", text, error=stall.error, trace=stacks[member.rank]
        )
        for member in members
        if member.rank in blamed
    ]
    # Ranks that did not answer `judge` are not asked for their stacks: the driver would wait ANSWER_S once more.
    others = [member for member in pending.values() if member.rank not in blamed]
    silent = [member.failed("silent", "does not answer") for member in others if member.rank in stall.silent]
    rest = [member for member in others if member.rank not in stall.silent]
    returned = [failure for failure in failures if failure.rank not in blamed]
    return (*hung, *cause_first([*returned, *silent, *_failures_of_unfinished(rest, math.inf)]))


def _ended(pending: Mapping[ray.ObjectRef[Any], Member]) -> list[WorkerFailure]:
    """Failures of pending calls that have ended since the last look."""
    done = ray.wait(list(pending), num_returns=len(pending), timeout=0)[0] if pending else []
    outcomes = [_outcome(pending[call], call) for call in done]
    return [outcome for outcome in outcomes if isinstance(outcome, WorkerFailure)]


def _with_last_activity(failures: tuple[WorkerFailure, ...], watch: ActivityWatch | None) -> tuple[WorkerFailure, ...]:
    """If the first failure is a death, add to its message what the rank did last, and what the others do now."""
    first, *rest = failures
    if first.kind != "died" or watch is None:
        return failures
    activity = watch.last_seen(first.rank) + watch.places()
    return (replace(first, message=f"{first.message}{activity}"), *rest)


def _poll(on_poll: Callable[[], None]) -> None:
    with contextlib.suppress(WorkerUnreachable):  # If the worker died, its long call fails too and names the cause.
        on_poll()


def _outcome(member: Member, call: ray.ObjectRef[Any]) -> Any:
    """The call's result, or a WorkerFailure."""
    try:
        value = ray.get(call)
    except RayActorError as error:
        return member.failed("died", _text_of_death(error), time_s=time.time())
    except Exception as error:  # noqa: BLE001 The process boundary: such as a result that does not unpickle here.
        return member.failed("error", f"{type(error).__name__}: {error}", time_s=time.time())
    return _raised(member, value) if isinstance(value, Failure) else value


def _raised(member: Member, failure: Failure) -> WorkerFailure:
    return member.failed(
        "error",
        failure.message,
        trace=failure.trace,
        collateral=failure.collateral,
        time_s=failure.time_s,
        error=failure.error,
    )


def _text_of_death(error: RayActorError) -> str:
    # The first line of Ray's text says that the actor died. Lines with its class, id and address follow, which we leave
    # out since our errors name rank, node and pid. After the reason comes a list of common causes.
    _, *lines = str(error).splitlines()
    reasons = [line.strip() for line in lines if "died" in line or "exit" in line or "reason" in line]
    return "its process died: " + (" ".join(reasons).partition(". Some common causes")[0] or str(error))


def _failures_of_unfinished(members: Sequence[Member], limit_s: float) -> list[WorkerFailure]:
    """Describe the ranks whose call has not returned, by asking for their stacks. A stopped rank does not answer."""
    limit = f" after {limit_s:g} s" if math.isfinite(limit_s) else ""
    failures = []
    for member, answer in zip(members, wait_for_stacks(members, ANSWER_S), strict=True):
        trace = None if answer is None else _outcome(member, answer)
        if trace is None:
            state = "does not answer" if member.pid else "has not started"
            failures.append(member.failed("silent", f"{state}{limit}: it was stopped, or its node is slow or cut off"))
        elif isinstance(trace, WorkerFailure):
            failures.append(trace)
        else:
            failures.append(member.failed("running", f"was still running{limit}", trace=trace))
    return failures


def succeeded(call: ray.ObjectRef[Any]) -> bool:
    """True if a call has returned a result that is no Failure. Does not wait."""
    try:
        return not isinstance(ray.get(call, timeout=0), Failure)
    except RayError:
        return False


def control(member: Member, method: str, *args: Any, timeout_s: float) -> Any:
    """Call a quick method of one rank's worker, also while a long one runs there.

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
        raise GangFailed(method, (_raised(member, value),)) from value.error
    return value
