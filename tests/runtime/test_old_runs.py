"""A run directory that an earlier version wrote is read, evaluated, replayed, reported, examined and resumed.

old_run.tar.xz holds a run of 3 steps on 2 workers, made by commit f6244f7 in an empty folder with a file text.txt,
without its report and its TensorBoard files:

    trimtab train --config tiny --name old --steps 3 --workers 2 --device cpu --data.path text.txt \
        --data.cache_dir cache --run.checkpoint_every 2 --run.eval_every 2 --run.eval_sequences 4 --balance.record 1 \
        --model.hidden 16 --model.num_layers 2 --model.num_heads 2 --model.dense_ffn_hidden 16 --model.max_seq_len 32 \
        --model.moe.num_experts 4 --model.moe.ffn_hidden 8
"""

import tarfile
from pathlib import Path

import pytest

from cluster.ray.session import RaySession
from runtime import read_events, read_load_history, read_metrics, read_scores
from runtime.cli import main

COUNTS = [[51, 82, 54, 69], [77, 9, 99, 71], [71, 41, 89, 55]]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, by its name in the current folder; its text lies beside it, where the run did not see it."""
    with tarfile.open(Path(__file__).with_name("old_run.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIMTAB_RUNS_DIR", raising=False)
    return Path("runs/old")


def test_its_records_are_read(old: Path) -> None:
    train, evals = read_metrics(old)
    assert [line["step"] for line in train] == [1, 2, 3]
    assert [line["step"] for line in evals] == [0, 2, 3]
    assert [event["event"] for event in read_events(old)] == ["started", "checkpoint", "checkpoint", "finished"]
    history = read_load_history(old)
    assert history.counts.tolist() == COUNTS
    assert history.bias[2].tolist() == pytest.approx([0.09534866, -0.10965218, 0.08778843, -0.07348491])
    assert read_scores(old).steps == [1, 2, 3]


def test_its_checkpoint_computes_the_loss_that_it_recorded(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "old", "--data.path", "text.txt", "--data.cache_dir", "cache"]) == 0
    assert "8.4837 bits per byte, loss 5.8743 on 128 held-out tokens" in " ".join(capsys.readouterr().out.split())


def test_it_is_replayed_examined_and_reported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "old"]) == 0
    assert "3 of 3 steps reproduced bit for bit" in capsys.readouterr().out
    assert main(["doctor", "old"]) == 0
    assert "biases    from -0.07232 to 0.08712\n\nsound\n" in capsys.readouterr().out
    assert main(["report", "old"]) == 0
    assert (old / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_it_is_resumed(old: Path, ray_session: RaySession) -> None:
    where = ["--data.path", "text.txt", "--data.cache_dir", "cache"]
    assert main(["train", "--resume", "old", "--steps", "4", *where]) == 0
    train, _ = read_metrics(old)
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    # What f6244f7 itself computes when it resumes.
    assert train[-1]["loss"] == pytest.approx(5.7929001, abs=1e-4)
    assert train[-1]["bias_version"] == 3
    history = read_load_history(old)
    assert history.counts[:3].tolist() == COUNTS
    assert read_events(old)[4]["event"] == "resumed"
