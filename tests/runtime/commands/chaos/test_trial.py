"""What a run owes is looked for in what it says, with some patience."""

import time
from types import SimpleNamespace

import pytest

from runtime.commands.chaos import trial as trials
from runtime.commands.chaos.kinds import KINDS
from runtime.commands.chaos.plan import ChaosFault
from runtime.commands.chaos.target import TargetRun, Unfulfilled
from runtime.commands.chaos.trial import Trial


def keep_promise(folder, says_meanwhile: str) -> Trial:
    testbed = SimpleNamespace(folder=folder, runs=folder, machines=[SimpleNamespace(address="10.0.0.1")])
    run = TargetRun(
        testbed,
        "struck",
        deadline=time.monotonic() + 60,
        on_wait=lambda run, _: run.terminal.write_text(says_meanwhile),
    )
    trial = Trial(fault=ChaosFault(number=0, kind=KINDS["kill coordinator"], step=3, rank=0, machine=0))
    trials._keep_promise(run, trial, run.said)
    return trial


def test_a_terminal_may_show_later_what_the_records_hold(tmp_path):
    assert keep_promise(tmp_path, "step 3\ncoordinator\nlost: step 3").said == "coordinator lost"


def test_what_is_never_said_is_missed_with_the_words_that_were_owed(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "SAY_S", 0.3)
    with pytest.raises(Unfulfilled, match=r"saying what it promises \(coordinator lost\): not after"):
        keep_promise(tmp_path, "all is well")
