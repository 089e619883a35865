"""A run that is alive keeps its directory, and stops when it loses it. Real `trimtab train`, one launch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from workers.record.run_log import read_events, read_metrics

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0


def train(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runtime", "train", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def refused(*arguments: str) -> str:
    """What a second start says, which ends before Ray starts."""
    process = train(*arguments)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2 and "Traceback" not in output and "text   " not in output, output
    return output


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)[0]) < count:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_living_run_has_one_writer_and_stops_when_its_directory_vanishes(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    settings = (
        "--config=tiny",
        "--name=mine",
        f"--run.dir={run.parent}",
        "--run.eval_every=0",
        "--run.checkpoint_every=5",
        f"--data.path=[{ROOT / 'LICENSE'},{ROOT / 'dispatch'}]",
        "--data.suffixes=[.py]",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--device=cpu",
    )
    first = train(*settings, "--steps=100000")
    try:
        wait_for_steps(run, 12, first)
        config = (run / "config.yaml").read_bytes()
        for again in ([*settings, "--steps=50"], [f"--resume={run}"]):
            assert f"{run} is being written by pid {first.pid} on " in refused(*again)
        assert (run / "config.yaml").read_bytes() == config
        assert [event["event"] for event in read_events(run) if event["event"] in ("failed", "resumed")] == []
        count = len(read_metrics(run)[0])
        wait_for_steps(run, count + 3, first)
        assert [line["step"] for line in read_metrics(run)[0]][: count + 3] == list(range(1, count + 4))
        assert run.stat().st_mode & 0o777 == 0o700

        run.rename(tmp_path / "moved")
        output, _ = first.communicate(timeout=PATIENCE_S)
        assert first.returncode == 1
        assert f"the run directory {run} is no longer this run's" in output and "Traceback" not in output
        assert not run.exists()
        num_steps = len(read_metrics(tmp_path / "moved")[0])
        assert [line["step"] for line in read_metrics(tmp_path / "moved")[0]] == list(range(1, num_steps + 1))
    finally:
        first.kill()
        first.wait()
