"""Rank 0's part of the control path: asks the coordinator for the next bias, and computes it while that is away.

Both ways give the same bits, because a law is a pure function and each report names the state it starts from. So no
update is lost, and no bias differs, when the coordinator dies, restarts, answers late or repeats itself.
"""

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from dispatch.laws import Law
from workers.control.wire import (
    BiasUpdate,
    LoadReport,
    Message,
    NeedState,
    Refusal,
    Seed,
    VersionedState,
    WireError,
    decode,
    encode,
    law_checksum,
    max_message_bytes,
)

# A call to a lost coordinator may take its whole time-out (2 s), in which all ranks wait. So retries become rarer, down
# to one in this many steps.
MAX_STEPS_BETWEEN_RETRIES = 32

# The last characters of a traceback that go into an event, which is one line of events.jsonl.
MAX_TRACE_CHARS = 8000

Event = dict[str, Any]


class CoordinatorUnreachable(ConnectionError):
    """No answer came in time, or the coordinator's process is away."""


class BadAnswer(WireError):
    """The coordinator answered, but not with the update that was asked for."""


class Leader:
    """Makes one BiasUpdate per step. Plain Python: no process group, no thread, no clock.

    coordinator: sends a message and returns the answer; it must end within a bounded time. An OSError from it, such as
    CoordinatorUnreachable, says that the coordinator is away; any other error is a bug. In both cases this rank applies
    the law. None: this rank always does.
    """

    def __init__(self, *, run_id: str, law: Law, coordinator: Callable[[bytes], bytes] | None) -> None:
        self._run_id, self.law = run_id, law
        self._law_checksum = law_checksum(law.config, law.layout)
        self._max_bytes = max_message_bytes(law)
        self._coordinator = coordinator
        # A coordinator starts without a state. With a seed in the first report it need not ask for one (NeedState).
        self._send_seed = True
        self._lost_since: int | None = None  # step
        self._told_of_bug = False  # whether a bug was reported since the coordinator was lost
        self._pause = 0  # steps between the last failure and the next try
        self._steps_until_retry = 0

    def next_update(self, step: int, base: VersionedState, counts_M: Tensor) -> tuple[BiasUpdate, list[Event]]:
        """Return the state that follows `base` under the global counts of `step`, and events about the coordinator.

        Raises:
            ValueError: the law itself refuses load or state; never because of what the coordinator does.
        """
        if self._coordinator is None or self._steps_until_retry:
            self._steps_until_retry = max(0, self._steps_until_retry - 1)
            return self._apply_law(step, base, counts_M), []
        try:
            update = self._ask(self._coordinator, step, base, counts_M)
        except Exception as error:  # noqa: BLE001 - a process boundary: nothing beyond it may stop the training
            return self._apply_law(step, base, counts_M), self._note_lost(step, error)
        return update, self._note_answer(step)

    def _apply_law(self, step: int, base: VersionedState, counts_M: Tensor) -> BiasUpdate:
        return BiasUpdate(step=step, version=base.version + 1, state=self.law.update(counts_M, base.state, step))

    def _ask(
        self, coordinator: Callable[[bytes], bytes], step: int, base: VersionedState, counts_M: Tensor
    ) -> BiasUpdate:
        report = LoadReport(
            run_id=self._run_id,
            step=step,
            base_version=base.version,
            base_checksum=base.checksum,
            law_checksum=self._law_checksum,
            counts_M=counts_M,
        )
        seeded = replace(report, seed=Seed(config=self.law.config, layout=self.law.layout, state=base.state))
        answer = self._exchange(coordinator, seeded if self._send_seed else report)
        if isinstance(answer, NeedState):
            answer = self._exchange(coordinator, seeded)
        if isinstance(answer, Refusal):
            raise BadAnswer(f"the coordinator refused the report: {answer.reason}")
        if not isinstance(answer, BiasUpdate) or (answer.step, answer.version) != (step, base.version + 1):
            raise BadAnswer(f"the coordinator answered another report: {answer!s:.300}")
        if not self.law.fits(answer.state):
            raise BadAnswer("the coordinator answered with the state of another law")
        return answer

    def _exchange(self, coordinator: Callable[[bytes], bytes], report: LoadReport) -> Message:
        raw = coordinator(encode(report))
        try:
            return decode(raw, self._max_bytes)
        except WireError as error:
            raise BadAnswer(str(error)) from error

    def _note_lost(self, step: int, error: Exception) -> list[Event]:
        self._send_seed = True
        self._pause = min(max(1, 2 * self._pause), MAX_STEPS_BETWEEN_RETRIES)
        self._steps_until_retry = self._pause
        is_bug = not isinstance(error, OSError | BadAnswer)
        # One event for each loss, not one for each retry; a bug is told even where the loss was told before.
        if self._lost_since is not None and (self._told_of_bug or not is_bug):
            return []
        self._lost_since = step if self._lost_since is None else self._lost_since
        self._told_of_bug = is_bug
        return [{"event": "coordinator_lost", "step": step, **_cause(error, is_bug=is_bug)}]

    def _note_answer(self, step: int) -> list[Event]:
        self._send_seed = False
        lost_since, self._lost_since, self._pause, self._told_of_bug = self._lost_since, None, 0, False
        if lost_since is None:
            return []
        return [{"event": "coordinator_back", "step": step, "lost_since_step": lost_since}]


def _cause(error: Exception, *, is_bug: bool) -> Event:
    """Say in an event why there was no answer. A bug must not pass for a process that is away."""
    text = f"{type(error).__name__}: {error}"
    if not is_bug:
        return {"cause": "bad answer" if isinstance(error, BadAnswer) else "unreachable", "reason": text}
    trace = "".join(traceback.format_exception(error))[-MAX_TRACE_CHARS:]
    return {"cause": "bug", "reason": f"a bug, not a lost process; please report it: {text}", "trace": trace}
