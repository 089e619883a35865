import json
from dataclasses import replace

import numpy as np
import pytest

from dispatch.laws import BalanceConfig
from runtime.cli import main
from runtime.commands.bench.balance.benchmark import BEST, DEFAULT_LAWS
from runtime.commands.bench.balance.verdict import PUBLISHED, TUNED, verdicts
from runtime.commands.replay.comparison import Comparison, LawOutcome
from runtime.commands.replay.figures import LawFigures
from runtime.commands.replay.specs import parse_law


def _comparison(ours: LawFigures, signs: tuple[LawFigures, ...], shift_step: int | None = 251) -> Comparison:
    laws = dict(zip((*TUNED, "ours"), (*signs, ours), strict=True))
    outcomes = {
        name: LawOutcome(config=BalanceConfig(), figures=each, max_vio_S=np.zeros(400)) for name, each in laws.items()
    }
    return Comparison(
        name="made up",
        steps=(1, 400),
        steady=(188, 250),
        shift_step=shift_step,
        floor_S=np.full(400, 0.3),
        threshold_S=np.full(400, 0.5),
        chance_floor=0.1,
        laws=outcomes,
    )


SIGNS = (
    LawFigures(balanced_after=100, recovered_after=None, max_vio_batch=0.32, max_vio_global=0.05, regret=0.03),
    LawFigures(balanced_after=40, recovered_after=60, max_vio_batch=0.35, max_vio_global=0.03, regret=0.03),
    LawFigures(balanced_after=12, recovered_after=20, max_vio_batch=0.45, max_vio_global=0.04, regret=0.03),
)
OURS = LawFigures(balanced_after=3, recovered_after=5, max_vio_batch=0.31, max_vio_global=0.03, regret=0.03)


def test_each_figure_is_held_against_the_sign_law_that_is_best_at_it() -> None:
    found = verdicts(_comparison(OURS, SIGNS), "ours")
    assert [(each.ours, each.theirs, round(each.times, 3), each.reached) for each in found] == [
        (3, 100, 33.333, True),
        (3, 12, 4.0, True),
        (5, 20, 4.0, True),
        (0.31, 0.32, 1.032, True),
        (0.03, 0.03, 1.0, True),
    ]


def test_what_is_missed_is_said() -> None:
    slow = replace(OURS, balanced_after=6, recovered_after=None, max_vio_batch=0.33, max_vio_global=0.04)
    found = verdicts(_comparison(slow, SIGNS), "ours")
    assert [each.reached for each in found] == [False, False, False, False, False]
    assert found[2].ours is None and found[2].times == 0.0


def test_never_counts_as_the_whole_trace_and_at_once_as_one_step() -> None:
    never = tuple(replace(each, balanced_after=None, recovered_after=None) for each in SIGNS)
    found = verdicts(_comparison(replace(OURS, balanced_after=0), never), "ours")
    assert [(each.times, each.at_least) for each in found[:3]] == [(250, True), (250, True), (30, True)]
    without_shift = verdicts(_comparison(OURS, SIGNS, shift_step=None), "ours")
    assert len(without_shift) == 4 and not any("recovers" in each.claim for each in without_shift)


def test_the_laws_of_the_benchmark_are_laws() -> None:
    assert {BEST, PUBLISHED} <= set(DEFAULT_LAWS)
    for spec in DEFAULT_LAWS:
        parse_law(spec)


@pytest.mark.slow
def test_a_short_benchmark_prints_draws_and_records(tmp_path, capsys) -> None:
    assert (
        main(["bench", "balance", "--seeds", "1", "--steps", "40", "--law", "sign:u=0.02", "--out", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    for said in ("simulation, seed 0", "sign:u=0.02", "chance floor", "MaxVio_global", "reached"):
        assert said in printed
    values = json.loads((tmp_path / "balance.json").read_text())
    (trace,) = values["traces"]
    assert (trace["steps"], trace["shift_step"]) == ([1, 40], 25)
    assert set(trace["laws"]) == {*DEFAULT_LAWS, "sign:u=0.02"}
    assert len(values["verdicts"]) == 5
    assert (tmp_path / "simulation-seed-0.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "--run RUN"),
        (["--law", "pid"], "'pid'"),
        (["--run", "no-such-run"], "no-such-run"),
        (["--first", "5"], "--first 5 is a step of recorded runs"),
    ],
)
def test_mistakes_are_named(arguments, said, tmp_path, capsys) -> None:
    assert main(["bench", "balance", *arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
