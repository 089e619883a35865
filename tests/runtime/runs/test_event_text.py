"""Events in words: every kind that the packages write has its own, and what it says is rounded, with units."""

import re

import pytest

from runtime.runs.event_text import _CLAUSES, event_line, event_text
from tests.readme_checker import ROOT

STARTED = {
    "time": 1.7e9,
    "event": "started",
    "step": 0,
    "balance": {"law": "sign", "rate": 0.001, "options": {}, "module": None},
    "rank_map": [
        {"rank": rank, "node": node, "node_id": "c73e4f", "device": "cpu", "experts": [0, 3]}
        for rank, node in enumerate(["10.0.0.1", "10.0.0.1", "10.0.0.2"])
    ],
    "exchange": {"exchange": "node", "ranks_per_node": 2, "reason": "2 nodes"},
    "ray_s": 10.98164060299996,
    "gang_s": 13.34985031899987,
}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            STARTED,
            ("started: step 0; ranks 0 to 1 on 10.0.0.1 (cpu), rank 2 on 10.0.0.2 (cpu); exchange node (2 nodes); "
             "law sign with rate 0.001; Ray was up after 11.0 s, the workers 13.3 s later"),
        ),
        (
            {"event": "checkpoint", "step": 10, "path": "/a/runs/b/checkpoints/step_00000010", "bytes": 1459555,
             "blocked_s": 0.006624299000577594, "write_s": 0.34548516499944526},
            "checkpoint: step 10; 1.39 MiB written in 345 ms; training stood still for 6.62 ms",
        ),
        (
            {"event": "finished", "step": 60, "saved_step": 60, "checkpoint_blocked_s": 0.27,
             "memory_checkpoint_blocked_s": 0.0},
            ("finished: step 60; saved at step 60; training stood still for 270 ms in checkpoints; "
             "for 0 ms in those in memory"),
        ),
        (
            {"event": "recovered", "step": 7, "total_s": 83.2, "seconds": {"back-off": 1.04, "first step": 2.5}},
            "recovered: step 7 after 1:23; back-off 1.04 s, first step 2.50 s",
        ),
        ({"event": "checkpoint", "step": 4, "from_memory": True}, "checkpoint: step 4; from the workers' memory"),
        # What a clause does not know is told as it is: nothing is hidden.
        ({"event": "new_kind", "sent_bytes": 2048, "wait_s": 0.01249}, "new kind: sent bytes 2.00 KiB; wait s 12.5 ms"),
    ],
)  # fmt: skip
def test_an_event_is_told_in_words(line: dict[str, object], words: str) -> None:
    assert event_line(line) == words
    assert event_text(line) == words.partition(": ")[2]


def test_stacks_are_left_to_the_report_but_for_those_of_a_bug() -> None:
    failed = {"event": "failed", "reason": "rank 1 hung", "diagnosis": "line\nline"}
    assert (event_line(failed), event_text(failed)) == ("failed: rank 1 hung", "rank 1 hung")
    bug = {
        "event": "coordinator_lost",
        "step": 3,
        "cause": "bug",
        "reason": "a bug: KeyError",
        "trace": "first\nlast\n",
    }
    words = "at step 3, rank 0 goes on with the same law by itself; a bug: KeyError"
    assert event_line(bug) == f"coordinator lost: {words}\nfirst\nlast"
    assert event_text(bug) == words


def test_every_kind_of_event_has_words() -> None:
    sources = [
        path.read_text() for folder in ("workers", "cluster", "runtime") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    call = r"(?:append_event\([\w.]+, |\b_?tell\(|\blog\.event\(|\"event\": )\"(\w+)\""
    kinds = {kind for text in sources for kind in re.findall(call, text)}
    assert {"checkpoint", "failed", "recovered", "warning", "coordinator_lost", "imported"} <= kinds
    assert kinds <= set(_CLAUSES)
