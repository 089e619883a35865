"""`trimtab compare` as a user runs it: real processes, real text, tiny models; stopped, killed and gone on with."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from runtime.commands.compare.plan import ComparePlan
from runtime.job import job
from runtime.job.launch import make_spec, open_ranks
from runtime.settings.config_file import parse_train
from workers.checkpoints.checkpoint_files import list_checkpoints
from workers.data.prepare import prepare_dataset
from workers.data.sampler import Sampler
from workers.record.run_log import read_events, read_load_history, read_metrics

ROOT = Path(__file__).parents[4]
STEPS, SHIFT = 60, 31


def settings(folder: Path, *more: str) -> list[str]:
    """Options that a run of `train` and the runs of `compare` have in common: two sources, their mix shifts."""
    return [
        "--config=tiny", "--workers=1", "--cluster.threads_per_worker=1", "--device=cpu", f"--steps={STEPS}",
        f"--data.path=[{ROOT / 'dispatch'},{ROOT / 'workers'}]", "--data.suffixes=[.py]",
        f"--data.cache_dir={folder / 'cache'}", "--data.mix=[0.75,0.25]", "--data.mix_after=[0.25,0.75]",
        f"--data.shift_at={SHIFT}", "--run.checkpoint_every=0", *more,
    ]  # fmt: skip


@contextmanager
def comparing(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "import sys; from runtime.cli import main; sys.exit(main())", "compare"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()  # its runs see that it is gone
        process.wait(30)


def finish(*arguments: str, code: int = 0) -> str:
    with comparing(*arguments) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < give_up, f"after 240 s still not: {what}"
        time.sleep(0.05)


def has_step(run_dir: Path, step: int) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def same_training(left: Path, right: Path) -> bool:
    """Whether two runs trained the same model to the bit."""
    names = ("step", "loss", "grad_norm", "bias_checksum")
    lines = [[[line[name] for name in names] for line in read_metrics(path)[0]] for path in (left, right)]
    histories = [read_load_history(path) for path in (left, right)]
    return lines[0] == lines[1] and histories[0].bias.tobytes() == histories[1].bias.tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def trained(folder: Path, ray_session: None) -> Path:
    """What `trimtab train` with Ray and a coordinator makes of the same settings."""
    config = parse_train(
        [*settings(folder), "--name=whole", f"--run.dir={folder}", "--balance.law=sign", "--balance.rate=0.02"]
    ).config
    assert job.train(config, resume=None, step=None) == 0
    return folder / "whole"


@pytest.mark.slow
def test_a_run_of_a_comparison_is_a_run_of_train_to_the_bit(folder: Path, trained: Path) -> None:
    out = folder / "plain"
    output = finish("--laws", "sign:u=0.02", "none", "--seeds=1", f"--out={out}", "--jobs=2", *settings(folder))
    assert same_training(out / "sign-u-0.02" / "seed_0", trained)
    assert not same_training(out / "none" / "seed_0", trained)
    assert read_load_history(trained).bias[-1].any()
    assert [path.name for path in list_checkpoints(out / "none" / "seed_0" / "checkpoints")] == ["step_00000060"]
    assert re.search(r"none seed 0 done in .*/2 runs", output), output
    assert re.search(r"^sign:u=0.02 +\d+\.\d{3} ", output, re.MULTILINE), output
    assert {path.name for path in out.glob("compare.*")} == {
        f"compare.{kind}" for kind in ("yaml", "md", "json", "png")
    }
    # Nothing is left to do: the results alone are made again.
    assert "done in" not in finish("--resume", f"--out={out}")


def test_the_mix_reaches_the_batches_of_a_rank(folder: Path) -> None:
    config = parse_train(settings(folder)).config
    dataset = prepare_dataset(config.data)
    sizes = (config.model.max_seq_len, config.run.global_batch_size, config.run.seed)
    mixed, plain = Sampler(dataset, *sizes, config.data.mix_schedule), Sampler(dataset, *sizes)
    with open_ranks(config.cluster, make_spec(config, folder / "none", dataset)) as ranks:
        sampler = ranks.worker._state.sampler
        for step in (0, SHIFT):
            drawn = sampler.batch(step, 0, 1)[0]
            assert torch.equal(drawn, mixed.batch(step, 0, 1)[0])
            assert not torch.equal(drawn, plain.batch(step, 0, 1)[0])


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_goes_on_to_the_same_bits(folder: Path, trained: Path) -> None:
    out = folder / "cut"
    # Slower, so that there is time to interrupt it: the same 60 steps, evaluated at every one.
    arguments = ["--laws", "sign:u=0.02", "none", "--seeds=1", f"--out={out}", "--jobs=1", *settings(folder)]
    run_dir = out / "sign-u-0.02" / "seed_0"
    with comparing(*arguments, "--run.eval_every=1") as process:
        wait_for(lambda: has_step(run_dir, 5), "step 5")
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert f"go on with: trimtab compare --resume --out {out}" in output
    assert "sign:u=0.02 seed 0 stopped, saved" in output
    (saved,) = list_checkpoints(run_dir / "checkpoints")
    assert 5 <= int(saved.name.removeprefix("step_")) < STEPS
    assert not (out / "none").exists()
    with pytest.raises(AssertionError, match=r"must keep run.steps \(was 60, now 70\)"):
        finish("--resume", f"--out={out}", "--steps=70")
    output = finish("--resume", f"--out={out}")
    assert "2/2 runs" in output
    assert [event["event"] for event in read_events(run_dir)] == [
        "started", "checkpoint", "interrupted", "resumed", "checkpoint", "finished"
    ]  # fmt: skip
    assert same_training(run_dir, trained)


@pytest.mark.slow
def test_a_run_that_dies_is_named_and_the_others_go_on(folder: Path) -> None:
    out = folder / "dies"
    run_dir = out / "sign" / "seed_0"
    arguments = ["--laws", "sign", "none", "--seeds=1", f"--out={out}", "--jobs=2", *settings(folder)]
    with comparing(*arguments, "--run.eval_every=1") as process:
        wait_for(lambda: has_step(run_dir, 3), "step 3")
        (child,) = (each for each in psutil.Process(process.pid).children() if each.cmdline()[-2:] == ["sign", "0"])
        child.kill()
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    assert re.search(r"failed: sign seed 0: exit code -9: .*seed_0.log", output), output
    plan = ComparePlan.read(out)
    assert [plan.is_finished(key) for key in plan.runs] == [False, True]
    # It had no checkpoint: it begins again, and nothing of before is in the way.
    assert "2/2 runs" in finish("--resume", f"--out={out}")
    assert len(read_metrics(run_dir)[0]) == STEPS


@pytest.mark.slow
def test_runs_save_and_end_when_the_command_is_killed(folder: Path) -> None:
    out = folder / "orphans"
    run_dir = out / "none" / "seed_0"
    arguments = ["--laws", "none", "--seeds=1", f"--out={out}", *settings(folder, "--run.eval_every=1")]
    with comparing(*arguments) as process:
        wait_for(lambda: has_step(run_dir, 3), "step 3")
        (child,) = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        child.wait(30)
    assert read_events(run_dir)[-1]["event"] == "interrupted"
    assert len(list_checkpoints(run_dir / "checkpoints")) == 1
