import json
from pathlib import Path

import pytest

from runtime.watch import event_log as module
from runtime.watch.event_log import EventLog
from workers.record.run_log import append_event

RECOVERY = ["failed", "recovering", "resumed", "recovered"]


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "not begun"),
        (["started", "checkpoint"], "running"),
        (["started", "finished"], "finished"),
        (["started", "finished", "resumed"], "running"),
        (["started", "interrupted"], "interrupted"),
        (["started", "failed"], "failed"),
        (["started", "failed", "recovering"], "recovering"),
        (["started", "failed", "recovering", "resumed", "checkpoint"], "recovering"),
        (["started", *RECOVERY], "running"),
        (["started", "moving", "interrupted", "resumed"], "recovering"),
        (["started", "moving", "interrupted", "resumed", "recovered", "finished"], "finished"),
        (["started", "failed", "recovering", "failed", "gave_up"], "failed"),
        (["started", "of tomorrow"], "running"),
    ],
)
def test_the_state_is_what_the_events_have_made_of_it(tmp_path: Path, events: list[str], state: str) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for name in events:
        append_event(tmp_path, name)
        log.poll()
    assert log.state == state


def test_events_are_told_in_words_with_their_stacks_aside(tmp_path: Path) -> None:
    append_event(tmp_path, "started", step=0, rank_map=[{"rank": 0, "node": "a", "device": "cpu"}])
    append_event(tmp_path, "failed", reason="it broke", diagnosis="line 1\nline 2", cause="own error")
    log = EventLog(tmp_path / "events.jsonl")
    assert log.poll()
    [started, failed] = log.since(0)
    assert started["text"] == "step 0; rank 0 on a (cpu)"
    assert (failed["text"], failed["stacks"]) == ("it broke; cause: own error", "line 1\nline 2")
    assert (started["verdict"], failed["verdict"]) == ("plain", "bad")
    assert log.start["rank_map"][0]["node"] == "a"
    assert log.since(1) == [failed]
    assert (log.num, log.num_failures) == (2, 1)
    assert not log.poll()


def test_hostile_events_are_shown_as_they_are_or_passed_over(tmp_path: Path) -> None:
    deep: list = []
    for _ in range(900):
        deep = [deep]
    odd = [
        {"event": "started", "rank_map": [{"<b>": 1}], "exchange": {"a": 1}, "balance": {"law": None}},
        {"event": "<img src=x onerror=alert(1)>", "text": "<script>"},
        {"event": "checkpoint", "step": {"a": "b"}, "bytes": "many", "write_s": [1, "x"]},
        {"event": "finished", "step": 10**400},
        {"event": "resumed", "rank_map": deep, "exchange": {"a": float("nan")}, "balance": deep},
        {"event": "checkpoint", "step": deep, "bytes": float("inf")},
        {"event": "warning", "text": "x" * 10**6, "trace": {"y": "z"}},
    ]
    bad = ['{"event": 3, "time": 1}', '{"event": "a"}', '{"event": "a", "time": -1}', '{"event": "a", "time": 1e99}',
           "[" * 9999, "nonsense", ""]  # fmt: skip
    lines = [*bad, *(json.dumps({"time": 5.0, **event}) for event in odd)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    log = EventLog(tmp_path / "events.jsonl")
    log.poll()
    shown = log.since(0)
    assert len(shown) == len(odd)
    assert "<b>" in shown[0]["text"]
    assert "<img" in shown[1]["event"]
    assert all(len(event["text"]) <= module.MAX_TEXT_CHARACTERS for event in shown)
    json.dumps([shown, log.start], allow_nan=False)


def test_a_long_log_is_kept_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EVENTS", 5)
    for number in range(9):
        append_event(tmp_path, "checkpoint", step=number)
    log = EventLog(tmp_path / "events.jsonl")
    log.poll()
    assert [event["step"] for event in log.since(0)] == [4, 5, 6, 7, 8]
    assert log.num == 9
