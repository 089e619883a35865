"""The load generator: a leader that reports one step after another, as fast as the answers come."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dispatch.laws import Law
from runtime.commands.bench.coordinator.case import ControlCase, counts_of
from workers.control.leader import Leader
from workers.control.wire import VersionedState

NUM_WARM_UP = 3
RUN_ID = "bench"


@dataclass(frozen=True)
class LoadFigures:
    """What the reports of one law cost.

    law_s: seconds of the law alone, one sample a step. step_s: seconds from the counts to the checked answer, by where
    the coordinator runs (FUNCTION or ACTOR of `measurement`). report_bytes, answer_bytes: of the messages, without the
    state that a new coordinator asks for.
    """

    case: ControlCase
    report_bytes: int
    answer_bytes: int
    law_s: list[float]
    step_s: dict[str, list[float]]


def measure_load(case: ControlCase, places: dict[str, Callable[[bytes], bytes]]) -> LoadFigures:
    """Send reports to each coordinator of `places`: by name, a function that takes a report and returns the answer."""
    law = case.make_law()
    law_s, _ = drive(law, None, case.rounds)
    step_s, sizes = {}, (0, 0)
    for name, coordinator in places.items():
        step_s[name], sizes = drive(law, coordinator, case.rounds)
    return LoadFigures(case, *sizes, law_s, step_s)


def drive(
    law: Law, coordinator: Callable[[bytes], bytes] | None, num_rounds: int
) -> tuple[list[float], tuple[int, int]]:
    """Report one step after the other. Returns the seconds of each, and the bytes of the last report and answer.

    coordinator: None lets the law run in this process.

    Raises:
        RuntimeError: the coordinator did not answer a report, so that the leader applied the law itself.
    """
    sizes = (0, 0)

    def counting(raw: bytes) -> bytes:
        nonlocal sizes
        assert coordinator is not None  # noqa: S101 - only then is it called
        answer = coordinator(raw)
        sizes = (len(raw), len(answer))
        return answer

    leader = Leader(run_id=RUN_ID, law=law, coordinator=coordinator and counting)
    base, seconds = VersionedState(0, law.initial_state()), []
    for step in range(NUM_WARM_UP + num_rounds):
        counts_M = counts_of(law, step)
        began = time.perf_counter()
        update, events = leader.next_update(step, base, counts_M)
        seconds.append(time.perf_counter() - began)
        if events:
            raise RuntimeError(f"the coordinator did not answer step {step}: {events[0]['reason']}")
        base = VersionedState(update.version, update.state)
    return seconds[NUM_WARM_UP:], sizes


def percentile(seconds: list[float], share: float) -> float:
    """The value that `share` percent of the samples do not exceed."""
    return float(np.percentile(seconds, share))
