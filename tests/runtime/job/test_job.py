"""The commands as a user runs them: real Ray, real workers, real text. The runs are tiny and shared by checks."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from cluster.config import ClusterConfig
from cluster.gang.placement import ClusterTooSmall
from cluster.ray.session import RaySession
from runtime.cli import main
from runtime.commands import inference
from runtime.job import job
from runtime.job.launch import make_spec, open_gang
from runtime.runs.run_inputs import find_checkpoint
from runtime.settings.config import TrainConfig, flatten
from runtime.settings.config_file import config_from_yaml_file, load_config, parse_train
from runtime.settings.size import records_bytes
from runtime.terminal.new_text import NewText
from runtime.watch.curves import Curves
from tests.workers.data.test_tokenizer import write_tokenizer
from workers.checkpoints.checkpoint_files import CheckpointCorrupt, list_checkpoints
from workers.checkpoints.tensor_reader import TensorReader
from workers.data.prepare import prepare_dataset
from workers.generation.generate import SamplingConfig
from workers.record.run_log import read_events, read_load_history, read_metrics

ROOT = Path(__file__).parents[3]
SETTINGS = (
    "--name=done",
    "--balance.law=sign",
    "--balance.rate=0.02",
    "--aux.loss=sequence",
    "--aux.alpha=0",  # measured, no more
    "--run.log_to=[tensorboard]",
)


def _arguments(folder: Path, *more: str) -> list[str]:
    """Options of a tiny run on text of this repository's own, in `folder`."""
    return [
        "--config=tiny",
        f"--run.dir={folder / 'runs'}",
        f"--data.path=[{ROOT / 'LICENSE'},{ROOT / 'dispatch'}]",
        "--data.suffixes=[.py]",
        f"--data.cache_dir={folder / 'cache'}",
        "--device=cpu",
        *more,
    ]


def _config(folder: Path, *more: str) -> TrainConfig:
    return parse_train(_arguments(folder, *more)).config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def run_dir(folder, ray_session):
    """A finished run of 20 steps on two workers."""
    assert job.train(_config(folder, *SETTINGS), resume=None, step=None) == 0
    return folder / "runs" / "done"


def test_a_run_leaves_all_that_the_next_tool_needs(run_dir):
    train, evals = read_metrics(run_dir)
    assert [line["step"] for line in train] == list(range(1, 21))
    assert [line["step"] for line in evals] == [0, 10, 20]
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step_00000010", "step_00000020"]
    assert read_load_history(run_dir).counts.shape == (20, 16)
    assert (run_dir / "report.html").stat().st_size > 10_000
    records = sum((run_dir / name).stat().st_size for name in ("metrics.jsonl", "load/history.bin"))
    estimate = records_bytes(config_from_yaml_file(run_dir / "config.yaml"))
    assert records < estimate < 1.5 * records
    assert list((run_dir / "tensorboard").iterdir())
    now = json.loads((run_dir / "now.json").read_text())
    assert [(row["rank"], row["step"] <= 20, row["memory_bytes"] > 2**26) for row in now["ranks"]] == [
        (0, True, True),
        (1, True, True),
    ]
    assert evals[-1]["val_bits_per_byte"] < evals[0]["val_bits_per_byte"]
    assert evals[0]["max_vio_global"] is None and evals[1]["max_vio_global"] > 0


@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_biases_of_another_one(run_dir, folder, capsys):
    text = f"--data.path=[{ROOT / 'LICENSE'}]"
    request = parse_train([f"--init={run_dir}", "--step=10", "--name=tuned", text, "--steps=2", "--run.eval_every=0"])
    assert request.config.optim.lr == 1e-5
    assert job.train(request.config, resume=None, step=request.step, init=request.init) == 0
    tuned = folder / "runs" / "tuned"
    began, others = tuned / "checkpoints" / "step_00000000", run_dir / "checkpoints" / "step_00000010"
    ours, theirs = TensorReader(began), TensorReader(others)
    names = [name for name in theirs.shapes if name.startswith("model.")]
    assert any("expert_bias_E" in name for name in names)
    for name in names:
        assert torch.equal(ours.read([name])[name], theirs.read([name])[name]), name
    embedding = "model.token_embedding.weight"  # two steps at 1e-5 move it, a little
    moved = TensorReader(tuned / "checkpoints" / "step_00000002").read([embedding])[embedding]
    assert 0 < (moved - theirs.read([embedding])[embedding]).abs().max() < 1e-4
    history = read_load_history(tuned)
    # The first step is routed by the bias that the other run had then: record 10 of its history.
    assert (history.bias[0] == read_load_history(run_dir).bias[10]).all()
    assert [event["event"] for event in read_events(tuned)[:2]] == ["initialised", "started"]
    assert [line["step"] for line in read_metrics(tuned)[0]] == [1, 2]
    request = parse_train([f"--resume={tuned}", "--steps=3", "--watch"])
    assert job.train(request.config, resume=tuned, step=None, watch=request.watch) == 0
    assert re.search(r"^watch  http://127\.0\.0\.1:\d+/\?token=", capsys.readouterr().out, re.MULTILINE)


def test_no_coordinator_of_a_run_stays_in_a_ray_that_was_joined(run_dir):
    family = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs([p for p in family if "CoordinatorActor" in "".join(p.cmdline())], timeout=10)
    assert not alive


def test_every_documented_field_is_in_every_line(run_dir):
    train, evals = read_metrics(run_dir)
    text = (ROOT / "docs" / "run-directory.md").read_text()
    for line in (train[0], train[-1], evals[0]):
        missing = [name for name in line if f"`{name}`" not in text]
        assert missing == [], "documented in docs/run-directory.md"
    assert Curves.in_lines(train + evals).own_metrics == ()
    required = """step loss lr grad_norm step_s tokens_per_s max_vio_batch max_vio_floor tokens_routed tokens_received
        tokens_returned control_wait_s bias_version bias_checksum"""
    assert set(required.split()) <= train[0].keys()
    assert {"step", "val_loss", "val_bits_per_byte", "max_vio_global"} <= evals[0].keys()


def test_no_token_is_lost_and_the_bias_moves(run_dir):  # B33, P9, P17
    train, _ = read_metrics(run_dir)
    expected = 4 * 64 * 2 * 2  # sequences x tokens x top_k x MoE layers
    for line in train:
        assert {line[f"tokens_{what}"] for what in ("routed", "sent", "received", "returned")} == {expected}
    assert [line["bias_version"] for line in train] == list(range(20))
    history = read_load_history(run_dir)
    assert abs(history.bias[1:]).max(1).min() > 0


def test_settings_arrive_where_they_act(run_dir, folder):  # B34
    wanted = flatten(_config(folder, *SETTINGS))
    recorded = flatten(config_from_yaml_file(run_dir / "config.yaml"))
    assert {name: value for name, value in recorded.items() if value != wanted[name]} == {}
    # The rate of the command line, not a default, is what moved the bias: after one step it is 0.02 up or down,
    # centred.
    first = read_load_history(run_dir).bias[1][:8]
    assert {round(float(value - first.min()), 6) for value in first} <= {0.0, 0.02, 0.04}
    line = read_metrics(run_dir)[0][5]
    assert line["lr"] == pytest.approx(2e-3, rel=0.1)
    assert 0.9 < line["aux_loss"] < 2
    assert line["z_loss"] is None


def test_the_rank_map_says_who_holds_which_experts(run_dir):
    (started,) = (event for event in read_events(run_dir) if event["event"] == "started")
    assert [(row["rank"], row["device"], row["experts"]) for row in started["rank_map"]] == [
        (0, "cpu", [0, 3]),
        (1, "cpu", [4, 7]),
    ]
    assert {(row["node"], row["interface"]) for row in started["rank_map"]} == {("127.0.0.1", "lo")}
    assert started["exchange"] == {"exchange": "rank", "ranks_per_node": 0, "reason": "1 node"}


def test_eval_and_generate_agree_on_one_worker_and_on_two(run_dir, capsys, ray_session):
    outputs = []
    for workers in (1, 2):
        assert inference.evaluate(run_dir, sequences=8, step=None, workers=workers, device="cpu") == 0
        prompts, sampling = ["def dispatch(", "", "import"], SamplingConfig(max_new_tokens=8)
        options = {"prompts": prompts, "sampling": sampling, "step": 10, "device": "cpu"}
        assert inference.generate(run_dir, workers=workers, **options) == 0
        captured = capsys.readouterr()
        outputs.append(captured.out)
        # The empty prompt is an end of document, one token; nothing ends before 8 new ones unless a document does.
        assert re.search(r"prefill 20 tokens in [\d.]+ s \([\d,]+ tokens/s\); decode \d+ tokens", captured.err)
    bits = [re.search(r"([\d.]+) bits per byte", text)[1] for text in outputs]
    assert bits[0] == bits[1]
    texts = [text[text.index("def dispatch(") :] for text in outputs]
    assert texts[0] == texts[1]
    assert texts[0].count("\n---\n") == 2
    assert texts[0].split("\n---\n")[2].startswith("import")
    assert float(bits[0]) == pytest.approx(read_metrics(run_dir)[1][-1]["val_bits_per_byte"], abs=1e-3)


@pytest.mark.slow
def test_a_run_and_its_text_can_be_taken_elsewhere(tmp_path, monkeypatch, capsys, ray_session):
    text, moved = tmp_path / "text", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "dispatch", text, ignore=shutil.ignore_patterns("__pycache__"))
    settings = ("--config", "tiny", "--steps", "3", "--device", "cpu", "--data.tokenizer")
    words = {"[UNK]": 0, "def": 1, **{f"word{index}": index for index in range(2, 256)}}
    tokenizer = write_tokenizer(tmp_path / "words.json", words)
    monkeypatch.setenv("TRIMTAB_RUNS_DIR", str(tmp_path / "runs"))
    assert main(["train", "--name", "own", *settings, str(tokenizer), *_places(text, tmp_path / "cache")]) == 0
    # Nothing is left where the run was made.
    moved.mkdir()
    for path in (tmp_path / "runs", text, tmp_path / "cache"):
        path.rename(moved / path.name)
    tokenizer.unlink()
    monkeypatch.setenv("TRIMTAB_RUNS_DIR", str(moved / "runs"))
    monkeypatch.setattr(RaySession, "open", lambda _config: pytest.fail("Ray is not needed"))
    capsys.readouterr()
    assert main(["generate", "own", "--prompt", "def", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("def")
    monkeypatch.setattr(NewText, "add", _add_and_interrupt)
    prompt = "def " * 200  # more than the 64 tokens that the model reads
    assert main(["generate", "own", "--prompt", prompt, "--temperature", "0"]) == 130
    captured = capsys.readouterr()
    assert captured.out.startswith(prompt) and len(captured.out) > len(prompt) + 1  # what there was is not lost
    assert "has 200 tokens and the model reads 64: its first 136 are left out" in captured.err
    assert "stopped after 3 new tokens" in captured.err
    assert main(["eval", "own"]) == 2
    assert re.search(r"text does not exist.*holds the tokens of the run.*--data.path", capsys.readouterr().err)
    assert main(["eval", "own", f"--data.cache_dir={moved / 'cache'}"]) == 0  # prepared tokens are enough
    assert main(["eval", "own", *_places(moved / "text", tmp_path / "new")]) == 0
    from_cache, from_text = re.findall(r"([\d.]+) bits per byte, loss", capsys.readouterr().out)
    assert from_cache == from_text
    monkeypatch.undo()
    (run,) = (moved / "runs").iterdir()
    resume = ["train", "--resume", str(run), "--steps", "4"]
    assert main([*resume, *_places(ROOT / "cluster", tmp_path / "new")]) == 2
    assert "this is other text than the run's" in capsys.readouterr().err
    assert main([*resume, *_places(moved / "text", tmp_path / "new")]) == 0
    assert read_metrics(run)[0][-1]["step"] == 4
    recorded = config_from_yaml_file(run / "config.yaml").data
    assert (recorded.path, recorded.tokenizer) == ((str(moved / "text"),), str(run / "tokenizer" / "words.json"))


_add = NewText.add


def _add_and_interrupt(new: NewText, index: int, token_id: int) -> None:
    _add(new, index, token_id)
    if new.num_tokens == 3:
        raise KeyboardInterrupt


def _places(text: Path, cache: Path) -> tuple[str, ...]:
    return f"--data.path={text}", f"--data.cache_dir={cache}"


@pytest.mark.slow
def test_killing_the_coordinator_costs_no_step_and_no_bit(folder, ray_session):  # P16
    import ray

    def train(name, kill_at):
        config = _config(folder, f"--name={name}", "--steps=60", "--run.eval_every=0", "--run.checkpoint_every=0")
        spec = make_spec(config, folder / "runs" / name, prepare_dataset(config.data))
        with open_gang(config.cluster, spec) as launched:
            killed = []

            def kill() -> None:
                if kill_at and not killed and len(launched.gang.control(0, "progress", 0)) >= kill_at:
                    os.kill(ray.get(launched.coordinator.status.remote())["pid"], signal.SIGKILL)
                    killed.append(True)

            launched.gang.run("train", None, None, poll_s=0.01, on_poll=kill)
            assert bool(killed) == bool(kill_at)
        return read_metrics(folder / "runs" / name)[0], read_load_history(folder / "runs" / name)

    calm, calm_history = train("calm", None)
    disturbed, disturbed_history = train("disturbed", 5)
    assert [line["step"] for line in disturbed] == [line["step"] for line in calm] == list(range(1, 61))
    assert "coordinator_lost" in [event["event"] for event in read_events(folder / "runs" / "disturbed")]
    assert calm_history.bias.tobytes() == disturbed_history.bias.tobytes()
    assert calm_history.bias[-1].any()
    assert [line["loss"] for line in calm] == [line["loss"] for line in disturbed]


def test_a_corrupt_checkpoint_is_refused_and_the_one_before_offered(folder, run_dir):
    newest = max(path for path in (run_dir / "checkpoints" / "step_00000020").glob("*.distcp"))
    content = newest.read_bytes()
    try:
        newest.write_bytes(content[:-100])
        with pytest.raises(CheckpointCorrupt, match=r"step 10 before it is intact.*--step 10"):
            find_checkpoint(run_dir, None)
        assert find_checkpoint(run_dir, 10).name == "step_00000010"
    finally:
        newest.write_bytes(content)
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; it has 10, 20"):
        find_checkpoint(run_dir, 7)


def test_a_cluster_without_the_resources_says_what_is_missing(folder, ray_session):
    config = _config(folder, "--name=big", "--workers=2")
    greedy = dataclasses.replace(config.cluster, device="cuda", gpus_per_worker=1.0)
    began = time.monotonic()
    with (
        pytest.raises(ClusterTooSmall, match=r"2 workers need .*1 GPU each"),
        open_gang(greedy, make_spec(config, folder / "runs" / "big", prepare_dataset(config.data))),
    ):
        pass
    assert time.monotonic() - began < 20
    assert not (folder / "runs" / "big").exists()


@contextmanager
def _trimtab(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [Path(sys.executable).with_name("trimtab"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for _ in range(2):  # stops at once, and takes its Ray along
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
        process.wait(60)


def _wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    metrics, give_up = run_dir / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < give_up and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} within 240 s; exit code {process.poll()}")


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_its_name_and_a_way_on(tmp_path):
    settings = (
        "--name=dies",
        "--steps=100000",
        "--run.checkpoint_every=5",
        "--run.eval_every=0",
        "--cluster.max_restarts=0",
    )
    arguments = _arguments(tmp_path, *settings)
    with _trimtab(tmp_path, "train", *arguments) as process:
        _wait_for_step(process, tmp_path / "runs" / "dies", 12)
        started = read_events(tmp_path / "runs" / "dies")[0]
        os.kill(started["rank_map"][1]["pid"], signal.SIGKILL)
        killed = time.monotonic()
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    assert time.monotonic() - killed < 30
    assert re.search(r"rank 1 .*failed first, in train: its process died", output), output
    assert re.search(r"saved up to step \d+; go on with: trimtab train --resume", output), output
    assert [event["event"] for event in read_events(tmp_path / "runs" / "dies")][-2:] == ["failed", "gave_up"]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_later(tmp_path):
    arguments = _arguments(tmp_path, "--name=cut", "--steps=100000", "--run.checkpoint_every=0", "--run.eval_every=0")
    with _trimtab(tmp_path, "train", *arguments) as process:
        _wait_for_step(process, tmp_path / "runs" / "cut", 1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert "--resume" in output
    (saved,) = list_checkpoints(tmp_path / "runs" / "cut" / "checkpoints")
    step = int(saved.name.removeprefix("step_"))
    assert [event["event"] for event in read_events(tmp_path / "runs" / "cut")] == [
        "started",
        "checkpoint",
        "interrupted",
    ]
    assert (tmp_path / "runs" / "cut" / "report.html").exists()
    with _trimtab(tmp_path, "train", "--resume", "cut", f"--steps={step + 5}") as resumed:
        output = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, output
    train, _ = read_metrics(tmp_path / "runs" / "cut")
    assert [line["step"] for line in train] == list(range(1, step + 6))


def test_a_dry_run_checks_and_tells_all_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "open_gang", None)
    assert main(["train", *_arguments(tmp_path), "--name=new", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"model .*\n(.*\n)*dry run: nothing was refused, and nothing was started or written\n$", told), (
        told
    )
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_dry_run_of_a_resume_leaves_the_run_as_it_is(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(job, "open_gang", None)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run_dir), "--steps=99", "--dry-run"]) == 0
    assert "going on from" in capsys.readouterr().out
    assert main(["train", "--resume", str(run_dir), "--dry-run"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_resume_of_a_complete_run_says_so_and_ends_well_as_a_job_that_is_started_again_must(
    run_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(job, "open_gang", None)
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(copy)]) == 0
    assert "copy has trained its 20 steps: nothing is left to do; a larger --steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    # A node was lost between the last checkpoint and the end.
    events = (copy / "events.jsonl").read_text().splitlines(keepends=True)
    (copy / "events.jsonl").write_text("".join(line for line in events if '"finished"' not in line))
    (copy / "report.html").unlink()
    assert main(["train", "--resume", str(copy), "--dry-run"]) == 0
    assert not (copy / "report.html").exists()
    assert main(["train", "--resume", str(copy)]) == 0
    assert f"report: {copy / 'report.html'}" in capsys.readouterr().out
    assert read_events(copy)[-1]["event"] == "finished"


def test_fewer_steps_than_are_done_are_refused_with_both_ways_out(run_dir, capsys):
    assert main(["train", "--resume", str(run_dir), "--steps=12"]) == 2
    told = capsys.readouterr().err
    assert "would go on from step 20, and run.steps (12) must be more; give a larger --steps" in told
    assert "or an earlier checkpoint with --step N" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.moe.top_k=9"], r"top_k \(9\).*num_experts \(8\)"),
        (["--model.moe.num_experts=10", "--model.moe.num_groups=4"], r"num_experts \(10\).*num_groups \(4\)"),
        (["--workers=3"], r"global_batch_size \(4\).*num_workers \(3\)"),
        (["--workers=4", "--parallel.ep_size=3"], r"ep_size \(3\).*\(4\)"),
        (["--data.path=/no/such/text"], "/no/such/text does not exist"),
        (["--data.path={empty}"], "holds no text"),
        (["--data.path={binary}"], "binary.bin is binary, not text"),
        (["--data.path={short}"], "too short|one sequence needs"),
        (["--config={broken}"], "broken.yaml"),
        (["--model.hiden=3"], "model.hidden"),
        (["--name=taken"], "exists already.*--resume"),
        (["--resume=nothing"], "no run 'nothing'"),
        (["--cluster.address=127.0.0.1:1"], "nothing answers at 127.0.0.1:1"),
    ],
)
def test_bad_input_is_named_before_anything_starts(arguments, said, tmp_path, capsys, monkeypatch):
    from runtime.cli import main

    monkeypatch.chdir(tmp_path)
    names = {name: tmp_path / name for name in ("empty", "binary", "short", "broken")}
    names["empty"].mkdir()
    names["binary"].mkdir()
    (names["binary"] / "binary.bin").write_bytes(b"a\0b" * 100)
    names["short"].write_text("too short\n")
    names["broken"] = tmp_path / "broken.yaml"
    names["broken"].write_text("run: [1, 2\n")
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "metrics.jsonl").write_text("")
    filled = [argument.format(**names) for argument in arguments]
    base = [] if filled[0].startswith("--resume") else _arguments(tmp_path)
    if filled[0].startswith("--data.path"):
        base.remove("--data.suffixes=[.py]")
    for dry in ([], ["--dry-run"]):
        code = main(["train", *base, *filled, *dry])
        output = capsys.readouterr().err
        assert re.search(said, output, re.DOTALL), output
        assert code == (1 if "cluster.address" in filled[0] else 2)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]


def test_presets_hold_what_they_promise():
    tiny, small, paper = (load_config(name) for name in ("tiny", "small", "paper-1b"))
    assert (paper.model.moe.num_experts, paper.model.moe.top_k, paper.model.hidden) == (64, 6, 1024)
    assert small.cluster == ClusterConfig(num_workers=2) and tiny.run.steps == 20
    assert json.dumps(flatten(small)["model.moe.top_k"])
