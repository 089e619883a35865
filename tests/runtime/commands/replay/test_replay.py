"""`trimtab replay` on a small real run: what it prints, writes and refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dispatch.errors import InvalidValue
from dispatch.laws import BalanceConfig
from dispatch.layout import LoadLayout
from runtime.cli import main
from runtime.commands.replay.copies import outcomes_of
from runtime.commands.replay.play import simulate_laws
from runtime.commands.replay.replay import replay
from runtime.commands.replay.score_trace import RecordedTrace
from runtime.settings.config import RunBalanceConfig, TrainConfig
from runtime.settings.config_file import config_to_yaml
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.data.text import DataConfig
from workers.record.record_file import list_records
from workers.record.run_log import HISTORY, LoadHistory, read_load_history

STEPS = 32  # fewer leave no room for the practical floor


def _train(rank, world_size, spec):
    join_worker(spec, rank, world_size, "run").train()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    balance = BalanceConfig(law="sign", rate=0.02)
    spec = replace(make_spec(folder, steps=STEPS), balance=balance, record_scores_every=1)
    run_ranks(2, _train, spec)
    config = TrainConfig(model=spec.model, run=spec.run, balance=RunBalanceConfig(law="sign", rate=0.02, record=1))
    (spec.run_dir / "config.yaml").write_text(config_to_yaml(config))
    return spec.run_dir


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoints"))


def test_laws_are_shown_beside_the_runs_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--law", "newton", "--law", "sign:u=0.003", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the run's own bias: 32 of 32 steps reproduced bit for bit"
    labels = ("sign:u=0.02, the run's own", "newton", "sign:u=0.003")
    rows = {label: line for line in lines for label in labels if line.startswith(f"{label}  ")}
    assert list(rows) == list(labels)
    assert any(line.startswith("practical floor") for line in lines)
    assert any(line.startswith("chance floor") for line in lines)
    assert lines[-2:] == [str(tmp_path / "out/replay.json"), str(tmp_path / "out/replay.png")]
    assert (tmp_path / "out/replay.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_holds_every_number(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(copy), "--threshold", "0.7", "--shift", "13"]) == 0
    assert "steps to" in capsys.readouterr().out
    values = json.loads((copy / "replay.json").read_text())
    assert values["own_bias"] == {"num_steps": STEPS, "num_equal": STEPS, "problem": None}
    assert (values["steps"], values["shift_step"], values["threshold_by_step"]) == (
        [1, STEPS],
        13,
        [0.7] * STEPS,
    )
    assert values["training_steps"] == list(range(1, STEPS + 1))
    assert list(values["laws"]) == ["sign:u=0.02, the run's own", "sign:u=0.001", "adaptive"]
    for law in values["laws"].values():
        assert len(law["max_vio_batch_by_step"]) == STEPS
        assert {"balanced_after", "recovered_after", "max_vio_batch", "max_vio_global", "regret"} < set(law)
    history = read_load_history(copy)
    first = [history.counts[0, where].max() / history.counts[0, where].mean() - 1 for where in history.layout.slices]
    own = values["laws"]["sign:u=0.02, the run's own"]
    assert own["max_vio_batch_by_step"][0] == pytest.approx(sum(first) / 2, abs=0.05)


def test_the_runs_own_law_does_on_its_scores_what_it_did_in_the_run(run: Path) -> None:
    trace = RecordedTrace(run)
    played = simulate_laws(trace, {"own": BalanceConfig(law="sign", rate=0.02)})["own"]
    history = read_load_history(run)
    # Not to the bit: a score of 16 bits can turn the choice of a token, and that the sign of a step of an expert.
    assert abs(played.counts - history.counts).sum() / history.counts.sum() < 0.05
    assert abs(played.bias - history.bias).mean() < 0.01


def test_a_sampled_trace_numbers_what_was_recorded(copy: Path) -> None:
    whole = RecordedTrace(copy)
    assert whole.name == "copied"
    fourth = whole.scores(4)
    path = copy / "scores/from_00000001/rank_0.bin"
    kept = [place for place in list_records(path)[0] if place.step % 3 == 1]  # 1, 4, ... 31
    raw = path.read_bytes()
    path.write_bytes(b"".join(raw[place.start : place.offset + place.num_bytes] for place in kept))
    sampled = RecordedTrace(copy, shift=5)
    assert (sampled.name, sampled.steps, sampled.shift_step) == ("copied, 11 recorded of 31 steps", range(1, 12), 3)
    assert sampled.training_steps == list(range(1, 32, 3))
    assert all(torch.equal(a, b) for a, b in zip(sampled.scores(2), fourth, strict=True))


def test_a_trace_may_begin_later_without_a_bias(run: Path) -> None:
    whole, late = RecordedTrace(run), RecordedTrace(run, shift=20, first=9)
    assert (late.name, late.steps, late.shift_step) == ("run, 24 steps from 9 on", range(1, 25), 12)
    assert all(torch.equal(a, b) for a, b in zip(late.scores(1), whole.scores(9), strict=True))
    assert not simulate_laws(late, {"own": BalanceConfig(law="sign", rate=0.02)})["own"].bias[0].any()


def test_the_own_law_is_not_played_twice(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--law", "sign:u=0.02", "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "replay.json").read_text())["laws"]) == ["sign:u=0.02, the run's own"]


def test_without_scores_the_history_is_checked_and_recording_explained(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "scores")
    assert main(["replay", str(copy)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "the run's own bias: 32 of 32 steps reproduced bit for bit"
    assert "trimtab train --balance.record" in " ".join(rest)
    assert not (copy / "replay.json").exists()
    assert main(["replay", str(copy), "--law", "newton"]) == 2  # what was asked for cannot be done
    assert "trimtab train --balance.record" in capsys.readouterr().err


def test_a_bias_that_does_not_follow_fails_after_all_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray((copy / HISTORY).read_bytes())
    raw[-1] ^= 1  # of the last bias
    (copy / HISTORY).write_bytes(raw)
    assert main(["replay", str(copy)]) == 1
    assert "31 of 32 steps reproduced bit for bit; step 32 was routed by another bias" in capsys.readouterr().out
    assert (copy / "replay.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--law", "nwton"], "--law nwton"),
        (["--law", "sign:u=fast"], "rate is 'fast'"),
        (["--shift", "33"], "--shift 33 must lie inside the recorded steps, 2 to 32"),
        (["--shift", "1"], "--shift 1 must lie inside the recorded steps, 2 to 32"),
        (["--first", "32"], "--first 32 must leave recorded steps to play on: at most 31"),
        (["--every", "5"], "--ranks and --every say how --copies are placed"),
        (["--first", "9", "--shift", "9"], "--shift 9 must lie inside the recorded steps, 10 to 32"),
    ],
)
def test_wrong_usage_is_named(run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_shift_of_the_settings_is_that_of_the_trace(copy: Path) -> None:
    config = TrainConfig(data=DataConfig(mix=(1.0, 0.0), mix_after=(0.0, 1.0), shift_at=12))
    (copy / "config.yaml").write_text(config_to_yaml(config))
    assert RecordedTrace(copy).shift_step == 12
    assert RecordedTrace(copy, shift=5).shift_step == 5


def test_threads_are_as_before(run: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    replay(run, laws=["none"], threshold=None, shift=None, first=None, out=tmp_path)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_plan_says_what_the_imbalance_of_each_law_would_cost(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "small", "--world", "16", "--simulate", "--worlds", "16", "--max-vio", "0", "1"]
    capsys.readouterr()
    assert main([*arguments, "--json", "--trace", str(run), "--law", "none", "--law", "newton"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [law["law"] for law in found["laws"]] == ["none", "newton"]
    assert all(1 < law["steady_times"] <= law["worst_times"] for law in found["laws"])
    assert main([*arguments, "--trace", str(run)]) == 0
    assert "law on run" in capsys.readouterr().out


def test_copies_are_judged_by_the_loads_of_the_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "scores", ignore_errors=True)  # they need no scores
    assert main(["replay", str(copy), "--copies", "1", "--copies", "2", "--ranks", "4", "--every", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "experts over 4 ranks, copies placed every 8 steps"
    rows = {line[:9]: [float(cell) for cell in line.split()[3:6]] for line in lines if line.startswith("at most")}
    none, one, two = (rows[f"at most {num}"] for num in (0, 1, 2))
    assert none[2] == 0
    assert all(row[1] >= row[0] >= 1 for row in rows.values())  # this run is nearly even: copies need not pay
    assert 0 < one[2] <= two[2] <= 8


def test_copies_are_placed_by_loads_that_came_before() -> None:
    # 2 layers of 4 experts on 2 ranks; expert 0 is hot up to step 4, expert 3 after it.
    counts = np.array([[70, 10, 10, 10] * 2] * 4 + [[10, 10, 10, 70] * 2] * 4)
    layout = LoadLayout(("a", "b"), (4, 4), (True, True))
    history = LoadHistory(np.arange(1, 9), counts, np.zeros((8, 8), np.float32), layout)
    every_step, every_4 = (outcomes_of(history, [1], ep_size=2, every=every)[1] for every in (1, 4))
    assert every_step.worst > 1.6  # step 5, which the loads of step 4 mislead
    assert every_step.busiest < 1.2
    assert every_4.busiest == every_4.worst == every_step.worst
    assert outcomes_of(history, [], ep_size=2, every=4)[0].busiest == pytest.approx(1.6)
    with pytest.raises(InvalidValue, match="recorded 8 steps, and the first 8 only place"):
        outcomes_of(history, [1], ep_size=2, every=8)
