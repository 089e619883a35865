"""A pipeline as a user runs it: real Ray, real workers; its run goes on in another shape."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.cli import main
from runtime.job import job
from runtime.settings.config_file import parse_train
from workers.record.run_log import read_events, read_metrics

ROOT = Path(__file__).parents[3]


def arguments(folder: Path, name: str, steps: int) -> list[str]:
    return [
        "--config=tiny",
        f"--name={name}",
        f"--run.dir={folder / 'runs'}",
        f"--data.path=[{ROOT / 'LICENSE'}]",
        f"--data.cache_dir={folder / 'cache'}",
        "--device=cpu",
        "--workers=2",
        "--parallel.pipeline.size=2",
        "--run.global_batch_size=8",
        "--run.micro_batch_size=2",
        "--run.eval_every=2",
        f"--steps={steps}",
    ]


@pytest.mark.slow
def test_a_pipeline_trains_and_its_run_goes_on_without_one(
    tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.train(parse_train(arguments(tmp_path, "stages", 4)).config, resume=None, step=None) == 0
    run_dir = tmp_path / "runs" / "stages"
    check_checkpoint(run_dir, capsys)
    request = parse_train([f"--resume={run_dir}", "--steps=6", "--parallel.pipeline.size=1"])
    assert job.train(request.config, resume=run_dir, step=None) == 0
    train, evals = read_metrics(run_dir)
    assert [line["step"] for line in train] == list(range(1, 7))
    assert [line["step"] for line in evals] == [0, 2, 4, 6]
    assert train[-1]["loss"] < train[0]["loss"]
    assert evals[-1]["val_loss"] < evals[0]["val_loss"]
    started, resumed = (event["rank_map"] for event in read_events(run_dir) if event["event"] in ("started", "resumed"))
    assert request.config.model.num_layers == 3
    assert [(row["stages"], row["layers"]) for row in started] == [([0], [[0, 1]]), ([1], [[2, 2]])]
    assert not any("stages" in row for row in resumed)


def check_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other commands read the newest checkpoint without a pipeline."""
    capsys.readouterr()
    assert main(["eval", str(run_dir)]) == 0
    (bits,) = re.findall(r"([\d.]+) bits per byte, loss", capsys.readouterr().out)
    assert float(bits) == pytest.approx(read_metrics(run_dir)[1][-1]["val_bits_per_byte"], rel=1e-3)
    assert main(["generate", str(run_dir), "--prompt", "Licence", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("Licence")


@pytest.mark.slow
def test_ctrl_c_in_a_pipeline_saves_and_its_run_goes_on(tmp_path: Path, ray_session: Any) -> None:
    run_dir = tmp_path / "runs" / "cut"

    def interrupt() -> None:
        metrics, give_up = run_dir / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and '"step": 3,' in metrics.read_text()) and time.monotonic() < give_up:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert job.train(parse_train(arguments(tmp_path, "cut", 400)).config, resume=None, step=None) == 130
    thread.join()
    (last,) = (event for event in read_events(run_dir) if event["event"] == "interrupted")
    assert 3 <= last["step"] == last["saved_step"] < 400
    steps = last["step"] + 2
    request = parse_train([f"--resume={run_dir}", f"--steps={steps}"])
    assert job.train(request.config, resume=run_dir, step=None) == 0
    assert [line["step"] for line in read_metrics(run_dir)[0]] == list(range(1, steps + 1))
