"""What chaos makes of records: verdicts and the page of results."""

import json
import math

from runtime.commands.chaos.plan import PRESETS, make_plan
from runtime.commands.chaos.results import Results, parts_of
from runtime.commands.chaos.trial import Trial

PLAN = make_plan(PRESETS["full"], 0)
KILLS = [fault for fault in PLAN if fault.kind.action == "kill"]


def results(trials, **more):
    values = {
        "preset": "full",
        "settings": PRESETS["full"],
        "seed": 0,
        "command": "trimtab chaos full",
        "machine": "2 cores",
        "calm_step_s": 0.25,
        "minutes": 30.0,
        "trials": trials,
        "missed": 0,
        "mismatches": (),
        "num_compared": {"steps": 500},
        "leftovers": (),
        "end": "",
    }
    return Results(**values | more)


def trial(fault, **more):
    parts = {"noticing": 0.5, "others ended": 1.0, "leave": 0.1, "processes and imports": 6.0, "of these imports": 2.5}
    given = {"verdict": "survived", "struck": 10.0, "detected_s": 0.5, "recovered_s": 9.0, "redone": 3, "parts": parts}
    return Trial(fault=fault, **given | more)


def test_anything_that_is_not_as_promised_fails_all_of_it():
    good = [trial(fault) for fault in KILLS]
    assert not results(good).failed
    assert results([*good, trial(KILLS[0], verdict="FAILED")]).failed
    assert results(good, missed=1).failed
    assert results(good, mismatches=("step 3: loss",)).failed
    assert results(good, leftovers=("process 7",)).failed
    assert "left behind: process 7" in results(good, leftovers=("process 7",)).summary()
    assert results(good, end="exit code 1").failed


def test_the_parts_of_a_recovery_are_named():
    parts = parts_of(trial(KILLS[0]))
    assert (parts["detection"], parts["process start"], parts["torch import"]) == (1.5, 3.5, 2.5)


def test_the_page_and_the_json_hold_every_fault(tmp_path):
    trials = [trial(KILLS[0]), trial(KILLS[1], recovered_s=11.0), trial(PLAN[0], recovered_s=math.nan, said="it was")]
    trials.append(trial(KILLS[2], verdict="FAILED", recovered_s=40.0, reason="recovering: not after 300 s"))
    results(trials).write(tmp_path)
    page = (tmp_path / "chaos.md").read_text()
    row = (
        KILLS[0].number + 1,
        KILLS[0].step,
        KILLS[0].kind.name,
        f"rank {KILLS[0].rank}",
        "survived",
        "0.5 s",
        "9.0 s",
        3,
    )
    assert f"| {' | '.join(map(str, row))} |" in page.splitlines()
    assert "median 11.0 s from the kill to the next new step (3 kills, 9.0 to 40.0 s)" in page
    assert "| detection | 1.50 | 1.50 | 1.50 |" in page
    assert f"{PLAN[0].number + 1}. {PLAN[0].kind.name}: `it was`" in page
    assert "recovering: not after 300 s" in page
    assert json.loads((tmp_path / "chaos.json").read_text())["trials"][2]["recovered_s"] is None
