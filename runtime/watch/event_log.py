"""Reads events.jsonl of a run: the state of the run, its ranks, and its last events as text."""

from collections import deque
from pathlib import Path
from typing import Any

from runtime.runs.event_text import STACKS, event_text
from runtime.watch.curves import is_number
from runtime.watch.plain import plain
from runtime.watch.tail import LineFile
from workers.record.record_lines import Line, parse_line
from workers.record.run_log import MAX_TIME

MAX_EVENTS = 400  # kept in memory, the last ones
MAX_STACK_CHARACTERS = 32_000  # as many as a run writes (cluster.failures.errors.MAX_DIAGNOSIS_CHARS)
MAX_TEXT_CHARACTERS = 4_000

# The state of a run after an event. A recovery ends with `recovered`: workers write `resumed` and `interrupted` within
# one, and these do not change the state then.
_STATES = {
    "started": "running",
    "resumed": "running",
    "recovered": "running",
    "recovering": "recovering",
    "moving": "recovering",
    "finished": "finished",
    "interrupted": "interrupted",
    "failed": "failed",
    "gave_up": "failed",
}
_WITHIN_A_RECOVERY = {"resumed", "interrupted"}
_VERDICTS = {"failed": "bad", "gave_up": "bad", "finished": "good", "recovered": "good"}
_WARNINGS = {
    "recovering", "moving", "warning", "record_hole", "checkpoint_failed", "checkpoint_waits", "bias_repaired",
    "coordinator_lost", "memory_checkpoint_failed", "memory_checkpoint_unusable", "interrupted",
}  # fmt: skip


class EventLog(LineFile):
    """events.jsonl of one run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._shown: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self.state = "not begun"
        self.num = self.num_recoveries = self.num_failures = 0
        self.last_time = 0.0
        self.start: Line = {}  # the last event that began or resumed training: its ranks, exchange and law

    def since(self, number: int) -> list[dict[str, Any]]:
        """The kept events from `number` on, as answers to the page: see `_as_answered`."""
        return [event for event in list(self._shown) if event["number"] >= number]

    def _take(self, offset: int, text: bytes) -> None:
        if (event := _parsed(text)) is not None:
            self._add(event)

    def _add(self, event: Line) -> None:
        name = event["event"]
        is_within = self.state == "recovering" and name in _WITHIN_A_RECOVERY
        self.state = self.state if is_within else _STATES.get(name, self.state)
        self.num_recoveries += name == "recovered"
        self.num_failures += name == "failed"
        if name in ("started", "resumed"):
            self.start = event
        self._shown.append(_as_answered(self.num, event))
        self.num += 1
        self.last_time = float(event["time"])


def _parsed(text: bytes) -> Line | None:
    event = parse_line(text)
    if event is None or not isinstance(event.get("event"), str):
        return None
    time = event.get("time")
    return plain(event) if is_number(time) and 0 <= time < MAX_TIME else None


def _as_answered(number: int, event: Line) -> dict[str, Any]:
    name = event["event"]
    verdict = _VERDICTS.get(name, "warn" if name in _WARNINGS else "plain")
    step = event.get("step")
    return {
        "number": number,
        "time": event["time"],
        "event": name[:64].replace("_", " "),
        "verdict": verdict,
        "step": step if type(step) is int else None,
        "text": event_text(event)[:MAX_TEXT_CHARACTERS],
        "stacks": "\n".join(str(event[each]) for each in STACKS if event.get(each))[:MAX_STACK_CHARACTERS],
    }
