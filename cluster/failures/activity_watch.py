"""Asks the ranks of a gang for their current activity while a long call runs on them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from cluster.failures.stall import Answer, Stall, find_stall
from dispatch.diagnosis.activity import Activity
from dispatch.diagnosis.collective_errors import ranks_text
from workers.actor import Failure
from workers.distributed.mailbox import CONTROL_GROUP

if TYPE_CHECKING:
    from cluster.failures.member import Member

Answers = dict[int, tuple[Answer, float]]  # by rank: its last answer, and time.monotonic() when that came

ASK_EVERY_S = 1.0
ANSWER_S = 2.0  # Longest wait for the answers of all ranks, which are asked at once: some may hang.


class ActivityWatch:
    """Keeps the last activity of every rank, and looks for a stall when a collective has lasted longer than its bound.

    `look` does not wait for answers unless a collective is overdue. A worker without a method `activity` is never
    blamed.

    Args:
        bound_s: longest wait of a collective (`cluster.collective_timeout_s`).
        answers: the dict that keeps each rank's last answer. The caller may read it meanwhile.
    """

    def __init__(self, members: Sequence[Member], bound_s: float, answers: Answers) -> None:
        self._members, self._bound_s = {member.rank: member for member in members}, bound_s
        self._asked: dict[int, tuple[ray.ObjectRef[Any], float]] = {}  # by rank: a call without answer, and its start
        self._answers = answers

    @property
    def all_answer(self) -> bool:
        """Whether every rank has answered within ANSWER_S of being asked."""
        now = time.monotonic()
        return all(now - asked < ANSWER_S for _, asked in self._asked.values())

    def look(self) -> Stall | None:
        """Collect answers and ask again where due. Returns a Stall once a rank has waited longer than the bound."""
        self._take(0.0)
        now = time.monotonic()
        for rank, member in self._members.items():
            due = self._answers.get(rank, (None, 0.0))[1] + ASK_EVERY_S
            if rank not in self._asked and now >= due:
                self._asked[rank] = self._ask(member), now
        if not any(_longest_wait(answer) >= self._bound_s for answer, _ in self._answers.values()):
            return None
        return self.judge(self._bound_s)

    def judge(self, bound_s: float) -> Stall | None:
        """Ask all ranks anew, wait at most ANSWER_S, and find who holds up a collective older than `bound_s`."""
        answers = self._ask_all()
        last_seen = {rank: self.last_seen(rank) for rank, answer in answers.items() if answer is None}
        names = {rank: member.name for rank, member in self._members.items()}
        setting = f"cluster.collective_timeout_s ({self._bound_s:g})"
        return find_stall(answers, names, bound_s, setting, last_seen)

    def last_seen(self, rank: int) -> str:
        """Last known activity of a rank, as the end of a sentence; empty if it never answered."""
        answer, answered = self._answers.get(rank, (None, 0.0))
        if not answer:
            return ""
        return f"; last seen {time.monotonic() - answered:.1f} s ago in {_place_in_step(answer)}"

    def places(self) -> str:
        """Current activity of all ranks that still answer, as the end of a sentence."""
        by_place: dict[str, list[int]] = {}
        for rank, answer in self._ask_all().items():
            if answer:
                by_place.setdefault(_place_in_step(answer), []).append(rank)
        return "".join(f"; {ranks_text(ranks)} in {place}" for place, ranks in by_place.items())

    def _ask_all(self) -> dict[int, Answer]:
        began = time.monotonic()
        self._asked = {rank: (self._ask(member), began) for rank, member in self._members.items()}
        self._take(ANSWER_S)
        latest = {rank: self._answers.get(rank, (None, 0.0)) for rank in self._members}
        return {rank: answer if answered >= began else None for rank, (answer, answered) in latest.items()}

    def _ask(self, member: Member) -> ray.ObjectRef[Any]:
        call: Any = member.actor.control.options(concurrency_group=CONTROL_GROUP).remote("activity")
        return call

    def _take(self, timeout_s: float) -> None:
        """Take the answers that come within `timeout_s`."""
        if not self._asked:
            return
        calls = {call: rank for rank, (call, _) in self._asked.items()}
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)[0]:
            rank = calls[call]
            del self._asked[rank]
            with contextlib.suppress(RayError):  # The rank died. Its long call ends with that error too.
                answer = ray.get(call)
                # A Failure: the worker has no method `activity`.
                self._answers[rank] = ({} if isinstance(answer, Failure) else answer), time.monotonic()


def training_activities(answers: Answers) -> dict[int, tuple[Activity, float]]:
    """By rank, the activity of the training thread in the last answer, and that answer's age in seconds."""
    now = time.monotonic()
    return {
        rank: (answer["training"], now - answered)
        for rank, (answer, answered) in sorted(answers.items())
        if answer and "training" in answer
    }


def _place_in_step(answer: Mapping[str, Activity]) -> str:
    activity = answer["training"]
    return str(activity.waits_in or activity)


def _longest_wait(answer: Answer) -> float:
    waits = [activity.waits_in for activity in (answer or {}).values() if activity.waits_in is not None]
    return max((wait.waited_s for wait in waits), default=0.0)
