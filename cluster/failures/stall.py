"""Finds the ranks that hold up the others, from the activity that each rank reports. Plain values, no Ray.

Every collective of a process group has a number (`Collective.index`). A rank is behind another one in a group if it has
started fewer collectives of that group; then the other one waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dispatch.diagnosis.activity import MOE_PHASES, Activity, Collective
from dispatch.diagnosis.collective_errors import CollectiveTimeout, ranks_text

Answer = Mapping[str, Activity] | None  # by thread; None: no answer came

# Phases in the order of a step. Of two ranks that wait for each other in different collectives, the one that is further
# on in the step has left out a collective.
_PHASES = (*MOE_PHASES, *(f"backward {phase}" for phase in MOE_PHASES), "gradients", "gradient norm", "bias update")
_SHOWN_RANKS = 16
_SAME_STALL_SHARE = 0.5  # A wait of at least this share of the bound belongs to the same stall as an overdue one.


@dataclass(frozen=True)
class Stall:
    """A collective that does not end.

    waiting: ranks that are in it. missing: ranks that they wait for; empty if all are in it. silent: ranks of the gang
    that do not answer the driver.
    """

    collective: Collective
    waiting: tuple[int, ...]
    missing: tuple[int, ...]
    silent: tuple[int, ...]
    error: CollectiveTimeout


@dataclass(frozen=True)
class _Wait:
    rank: int
    thread: str
    collective: Collective
    blockers: tuple[int, ...]


def find_stall(
    answers: Mapping[int, Answer], names: Mapping[int, str], bound_s: float, setting: str, last_seen: Mapping[int, str]
) -> Stall | None:
    """The collective that has lasted longer than `bound_s`, and the ranks to blame; None if no collective has.

    Args:
        answers: activities of every rank of the gang, by rank.
        names: name of every rank, with node, process and device.
        setting: the setting of the bound and its value, for the error text.
        last_seen: for ranks that do not answer now, the activity they reported last, as the end of a sentence.
    """
    waits = [wait for rank in answers for wait in _waits_of(rank, answers)]
    overdue = sorted((w for w in waits if w.collective.waited_s >= bound_s), key=lambda w: -w.collective.waited_s)
    if not overdue:
        return None
    wait, missing = _choose_wait(overdue, waits, answers, bound_s)
    same = [w for w in waits if (w.collective.group, w.collective.index) == _key(wait)]
    c = wait.collective
    silent = tuple(rank for rank, answer in answers.items() if answer is None)
    lines = [f"  {names[rank]}: {_state(answers[rank], wait, last_seen.get(rank, ''))}" for rank in missing]
    lines += [
        f"  {names[w.rank]}: waits in it for {w.collective.waited_s:.1f} s" for w in same if w.rank not in missing
    ]
    if not missing:
        lines += _divergence(wait, answers)
    error = CollectiveTimeout(
        step=c.step,
        layer=c.layer,
        phase=c.phase,
        waited_s=c.waited_s,
        missing_ranks=missing,
        setting=setting,
        details="\n".join([*lines, *_matrix(same, c.members)]),
    )
    return Stall(c, tuple(w.rank for w in same), missing, silent, error)


def _waits_of(rank: int, answers: Mapping[int, Answer]) -> list[_Wait]:
    waits = []
    for thread, activity in (answers[rank] or {}).items():
        if (c := activity.waits_in) is not None:
            blockers = tuple(m for m in c.members if m != rank and _is_behind(answers.get(m), thread, c))
            waits.append(_Wait(rank, thread, c, blockers))
    return waits


def _is_behind(answer: Answer, thread: str, collective: Collective) -> bool:
    """Whether a rank has not started a collective yet; a rank that does not answer counts as one that has not."""
    if answer is None:
        return True
    return thread in answer and answer[thread].started.get(collective.group, 0) < collective.index


def _choose_wait(
    overdue: Sequence[_Wait], waits: Sequence[_Wait], answers: Mapping[int, Answer], bound_s: float
) -> tuple[_Wait, tuple[int, ...]]:
    """Choose the wait to report and the ranks to blame for it: those that wait for nobody, if there are any."""
    waiting = {wait.rank for wait in waits}
    for wait in overdue:
        if free := tuple(rank for rank in wait.blockers if rank not in waiting):
            return wait, free
    # Every blocker waits too. So some ranks, usually few, left out a collective and wait in a later one for the other
    # ranks, which wait for them in the earlier one. Blame the smallest set of blockers. Waits that began later than the
    # overdue one need not be overdue yet: all that belong to the same stall are compared.
    old = [wait for wait in waits if wait.collective.waited_s > _SAME_STALL_SHARE * bound_s]
    if not any(wait.blockers for wait in old):
        return overdue[0], ()
    crosswise = [replace(wait, blockers=wait.blockers or _in_another_place(wait, answers)) for wait in old]
    wait = min(
        (wait for wait in crosswise if wait.blockers),
        key=lambda w: (len(w.blockers), w.collective.step, _phase_index(w.collective.phase)),
    )
    return wait, wait.blockers


def _in_another_place(wait: _Wait, answers: Mapping[int, Answer]) -> tuple[int, ...]:
    """Members that started the collective of the same number in another step, layer or phase."""
    members = {member: answers.get(member) for member in wait.collective.members}
    places = {m: a[wait.thread].recent.get(_key(wait)) for m, a in members.items() if a and wait.thread in a}
    return tuple(member for member, place in places.items() if place not in (None, places[wait.rank]))


def _phase_index(phase: str) -> int:
    name = phase.partition(",")[0]
    return _PHASES.index(name) if name in _PHASES else len(_PHASES)


def _key(wait: _Wait) -> tuple[str, int]:
    return wait.collective.group, wait.collective.index


def _state(answer: Answer, wait: _Wait, last_seen: str) -> str:
    """What a rank that is missing in `wait` does instead, as the predicate of a sentence: "does not answer: ..."."""
    if answer is None:
        return "does not answer: it is stopped, or its node is slow or cut off" + last_seen
    activity = answer[wait.thread]
    own = next((a.waits_in for a in answer.values() if a.waits_in is not None), None)
    if own is None:
        return f"has been in {activity} for {activity.phase_s:.1f} s"
    text = f"waits itself in {own}, for {own.waited_s:.1f} s"
    missed = wait.collective
    ahead = (own.step, _phase_index(own.phase)) > (missed.step, _phase_index(missed.phase))
    return text + (f": it left out {missed}" if ahead else "")


def _divergence(wait: _Wait, answers: Mapping[int, Answer]) -> list[str]:
    """For a collective that all ranks have started: its step, layer and phase on each rank, if they differ."""
    places: dict[str, list[int]] = {}
    for member in wait.collective.members:
        answer = answers.get(member)
        if answer and wait.thread in answer:
            place = answer[wait.thread].recent.get(_key(wait))
            places.setdefault(place or "somewhere before", []).append(member)
    if len(places) < 2:
        return []
    return ["  the ranks disagree on what it is:"] + [f"    {ranks_text(r)}: {place}" for place, r in places.items()]


def _matrix(waits: Sequence[_Wait], members: Sequence[int]) -> list[str]:
    """Matrix of the rows that each rank sends to each other rank, with what the receiver expects where it differs."""
    splits = {w.rank: w.collective.splits for w in waits if w.collective.splits is not None}
    if not splits:
        return []
    lines = [
        "  rows by sender (down) and receiver (across); (n): expected, and the sender is not in it; a!b: sent!expected"
    ]
    shown = members[:_SHOWN_RANKS]
    lines.append("    rank " + " ".join(f"{rank:>9}" for rank in shown))
    for i, sender in enumerate(shown):
        cells = []
        for j, receiver in enumerate(shown):
            sent = splits[sender].sent[j] if sender in splits else None
            expected = splits[receiver].expected[i] if receiver in splits else None
            cells.append("." if i == j else _cell(sent, expected))
        lines.append(f"    {sender:>4} " + " ".join(f"{cell:>9}" for cell in cells))
    if len(members) > len(shown):
        lines.append(f"    and {len(members) - len(shown)} more ranks")
    return lines


def _cell(sent: int | None, expected: int | None) -> str:
    if sent is None:
        return "?" if expected is None else f"({expected})"
    return str(sent) if expected in (None, sent) else f"{sent}!{expected}"
