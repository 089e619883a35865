"""The command line: what it hands over, its exit codes, and how quickly it answers."""

import errno
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import runtime.commands
import runtime.job
from dispatch.errors import UserError
from runtime.cli import COMMANDS, main
from runtime.commands.generate import read_prompts
from runtime.commands.hf.import_model import _with_batch_of_any_workers, import_model
from runtime.settings.config import flatten
from runtime.settings.config_file import load_config
from workers.generation.generate import SamplingConfig

ROOT = Path(__file__).parents[2]

BENCHES = [["bench", "dispatch"], ["bench", "coordinator"]]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for what trains and what infers; `calls` holds what it was given, `outcome` is returned or raised."""
    fake = SimpleNamespace(calls=[], outcome=0)

    def record(*args: Any, **options: Any) -> int:
        fake.calls.append((args, options))
        if isinstance(fake.outcome, BaseException):
            raise fake.outcome
        return fake.outcome

    fake.train = fake.evaluate = fake.generate = record
    monkeypatch.setattr(runtime.job, "job", fake, raising=False)
    monkeypatch.setattr(runtime.commands, "inference", fake, raising=False)
    return fake


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    (path / "config.yaml").write_text("")
    return path


def test_train_hands_the_checked_configuration_over(job: SimpleNamespace) -> None:
    assert main(["train", "--config", "tiny", "--steps", "3"]) == 0
    [((config,), options)] = job.calls
    assert (config.run.steps, config.model) == (3, load_config("tiny").model)
    assert options == {"resume": None, "step": None, "init": None, "dry_run": False, "watch": False}


def test_train_without_options_trains_the_default_model(job: SimpleNamespace) -> None:
    assert main(["train"]) == 0
    [((config,), _)] = job.calls
    assert config == load_config("small")


def test_eval_and_generate_hand_their_options_over(job: SimpleNamespace, run: Path) -> None:
    assert main(["eval", str(run), "--step", "7", "--workers", "4"]) == 0
    prompts = run / "prompts"
    prompts.write_text("second\n\nthird\n")
    for texts in (["--prompt", "To be", "--prompt", ""], ["--prompts-file", str(prompts)]):
        assert main(["generate", str(run), *texts, "--temperature", "0", "--seed", "3"]) == 0
    common = {"step": None, "workers": None, "device": None}
    assert job.calls[0] == ((run,), {**common, "step": 7, "workers": 4, "sequences": None, "settings": []})
    sampling = SamplingConfig(max_new_tokens=200, temperature=0.0, top_p=0.95, seed=3, batch_size=32)
    for call, prompts in zip(job.calls[1:], (["To be", ""], ["second", "third"]), strict=True):
        assert call == ((run,), {**common, "prompts": prompts, "before": None, "sampling": sampling})


def test_a_file_of_prompts_without_text_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompts-file", "/nonexist"]) == 2
    assert "--prompts-file /nonexist cannot be read: No such file or directory" in capsys.readouterr().err
    for content, reason in ((b"\n\n", "has no text to continue"), (b"\xff\n", "is not UTF-8 text")):
        (run / "prompts").write_bytes(content)
        assert main(["generate", str(run), "--prompts-file", str(run / "prompts")]) == 2
        assert f"{run / 'prompts'} {reason}" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_no_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--prompt", "\udcff"], ["--prompt", "a", "--chat", "--system", "\udcff"]):
        assert main(["generate", str(run), *options]) == 2
        assert r"'\udcff' is not UTF-8 text; give it in UTF-8, or by --prompts-file" in capsys.readouterr().err


def test_report_prints_where_it_wrote(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = ModuleType("runtime.report.report")
    fake.write_report = lambda path: path / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runtime.report.report", fake)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian' is no command; did you mean train?"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["train", "--model.hiden", "3"], "unknown option --model.hiden; did you mean --model.hidden?"),
        (["train", "--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file or preset"),
        (["train", "--config"], "--config: expected one argument"),
        (["train", "--balance.rate", "nan"], "balance.rate is 'nan'; it must be a number"),
        (["train", "--data.mix", "[a]"], "data.mix is 'a'; it must be a list of numbers, as [0.5,0.5]"),
        (["train", "--help", "mode"], "--help mode: there is no such section; choose from run, model, balance, "),
        (["train", "--workers", "3"], "run.global_batch_size (16) must be a multiple of cluster.num_workers (3)"),
        (["train", "--data.tokenizer", "/no/file"], "data.tokenizer /no/file cannot be read"),
        (["eval"], "RUN"),
        (["eval", "no-such-run"], "there is no run 'no-such-run'"),
        (["eval", "x", "--workers", "0"], "--workers: '0' must be a whole number of at least 1"),
        (["generate", "x"], "there is no run 'x'"),
        (["generate", "x", "--prompt", "a", "--top-p", "nan"], "--top-p: 'nan' must be a number from 0.01 to 1"),
        (["generate", "x", "--prompt", "a", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["train", "--name", "n" * 300], "run.name 'nnnnnnnnnnnnnnnnnnnn'... must have at most 200 bytes"),
        (["report", "x", "--fast"], "unrecognized arguments: --fast"),
        (["generate", "x", "--promt", "a"], "unrecognized arguments: --promt a; did you mean --prompt?"),
        (["report", "~no-such-user/x"], "is known for a path that begins with ~; set HOME, or write the path"),
        (["train", "--data.tokenizer", "~no-such-user/x"], "is known for a path that begins with ~; set HOME"),
        (["--verison"], "unrecognized arguments: --verison; did you mean --version?"),
        (["runs", ""], "unrecognized arguments: "),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_starts(
    arguments: list[str], message: str, job: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert "Traceback" not in written.err
    assert not job.calls


def test_a_batch_that_no_memory_holds_is_refused_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for batch, message in (
        (10**14, "run.global_batch_size (100000000000000) must be at most 16777216 sequences"),
        (2**23, "a smaller model or batch (--run.micro_batch_size)"),
    ):
        options = ["--run.global_batch_size", str(batch), "--run.dir", str(tmp_path), "--device", "cpu"]
        assert main(["train", *options]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (1, 1, ""),
        (UserError("rank 1 died at step 3"), 1, "trimtab train: error: rank 1 died at step 3\n"),
        (KeyboardInterrupt(), 130, "trimtab: stopped\n"),
    ],
)
def test_failure_ends_with_1_a_stop_with_130_and_its_message(
    outcome: Any, code: int, message: str, job: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    job.outcome = outcome
    assert main(["train", "--config", "tiny"]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("bug", [ValueError("operands could not be broadcast"), RuntimeError("oh"), KeyError("x")])
def test_a_bug_keeps_its_traceback_and_says_that_it_is_one(
    bug: Exception, job: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    job.outcome = bug
    assert main(["train", "--config", "tiny"]) == 70
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last):\n")
    assert f"this is a bug in Trimtab ({type(bug).__name__}), not a mistake of yours. Please report it" in told
    assert "command:  trimtab train --config tiny\n" in told
    assert all(f"{name} {version(name)}" in told for name in ("trimtab", "torch", "ray"))


def test_a_bug_of_a_worker_is_told_as_one_with_the_traceback_of_the_worker(
    job: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    class BugElsewhere(UserError):
        is_bug = True

    job.outcome = BugElsewhere("rank 1 failed first\nits own traceback")
    assert main(["train", "--config", "tiny"]) == 70
    told = capsys.readouterr().err
    assert told.startswith("rank 1 failed first\nits own traceback\n\ntrimtab: this is a bug in Trimtab (BugElsewhere)")


@pytest.mark.parametrize(
    ("refusal", "code", "message"),
    [
        (OSError(errno.ENOSPC, "x", "/disk/file"), 1, "error: /disk/file: No space left on device; free some space"),
        (OSError(errno.EROFS, "x", "/disk"), 1, "error: /disk: Read-only file system; choose a place that can be"),
        (OSError(errno.ENAMETOOLONG, "x", "aaa"), 2, "error: aaa: File name too long; choose a shorter name"),
    ],
)
def test_what_the_system_refuses_is_no_bug(
    refusal: OSError, code: int, message: str, job: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    job.outcome = refusal
    assert main(["train", "--config", "tiny"]) == code
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "usage: trimtab COMMAND"),
        ("eval", "required: RUN"),
        ("generate", "required: RUN"),
        ("import", "required: DIR, RUN"),
        ("export", "required: RUN, DIR"),
        ("stop", "required: RUN"),
        ("report", "required: RUN"),
        ("replay", "required: RUN"),
        ("watch", "required: RUN"),
        ("bench", "targets:\n  dispatch"),
        ("compare", "--laws is missing"),
        ("cluster", "actions:\n  up"),
        ("cluster join", "required: ADDRESS"),
        ("cluster manifest", "kinds:\n  kuberay"),
        ("cluster manifest kuberay", "required: "),
        ("cluster manifest slurm", "required: "),
        ("cluster manifest ray-up", "required: "),
        ("submit", "usage: trimtab submit [options] -- COMMAND"),
        ("plan", "required: CONFIG"),
        ("doctor", "targets:\n  cluster"),
        ("chaos", "required: PRESET"),
    ],
)
def test_a_command_that_needs_arguments_shows_its_usage_without_any(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    written = capsys.readouterr()
    assert words in written.err
    assert not written.out


def test_no_command_is_without_a_test_of_it_alone() -> None:
    """Those that do something without arguments: `train` above, `runs`, `bench`, `cluster` beside their own tests."""
    (alone,) = (
        mark.args[1]
        for mark in test_a_command_that_needs_arguments_shows_its_usage_without_any.pytestmark  # type: ignore[attr-defined]
    )
    assert {*COMMANDS} - {"train", "runs"} == {command.split()[0] for command, _ in alone if command}


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["eval"],
        ["generate"],
        ["runs"],
        ["stop"],
        ["report"],
        ["replay"],
        ["watch"],
        ["bench"],
        ["plan"],
        ["doctor", "PATH"],
        ["import"],
        ["export"],
        ["compare"],
        ["submit"],
        ["chaos"],
        ["cluster", "up"],
        ["cluster", "manifest", "slurm"],
        ["train"],
        *BENCHES,
    ],
)
def test_help_explains_every_option_in_lines_that_break_no_word(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("trimtab" in line for line in lines)
    assert [line for line in lines if len(line) > 120 or line.endswith("-")] == []


def help_of_train(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 0
    return capsys.readouterr().out


def test_help_of_train_is_a_page_with_what_people_use_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of_train(capsys, "--help")
    assert 20 <= len(text.splitlines()) <= 32
    for words in ("--name NAME", "--data.path PATH", "presets", "optimizer steps (400)", "--help-all"):
        assert words.replace("presets", "compare, paper-1b, small, tiny") in text


def test_every_setting_has_its_words_and_its_default_in_the_whole_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of_train(capsys, "--help-all", "--config", "tiny")
    options = re.findall(r"^  (--[a-z]+\.[\w.]+)", text, re.MULTILINE)
    assert options == [f"--{key}" for key in flatten(load_config("tiny"))]
    words = " ".join(text.split())
    for found in (
        "--run.dtype {float32,bfloat16} Number format of the computation; weights",
        "takes bfloat16 (float32)",
        f"--run.steps N Optimizer steps ({load_config('tiny').run.steps})",  # of the chosen file
        "--balance.rate X Step of the bias, in the law's own unit; empty: the law's default (not set)",
        "--balance.options {NAME: X} Further constants",
        "--model.moe.top_k N Experts chosen by each token",
    ):
        assert found in words
    assert not re.search(r"CONFIG|\(type:", text)


def test_help_of_a_section_is_that_section_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of_train(capsys, "--help", "optim")
    assert set(re.findall(r"^  --(\w+)\.", text, re.MULTILINE)) == {"optim"}


# The wall clock of a shared machine says little: what costs seconds is the import of torch and Ray.
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["eval", "--help"],
        ["generate", "nowhere"],
        ["replay", "--help"],
        ["replay", "nowhere"],
        ["watch", "--help"],
        ["watch", "nowhere"],
        ["plan", "--help"],
        ["doctor", "PATH", "--help"],
        ["doctor", "nowhere", "--step", "x"],
        ["plan", "small", "--world", "0"],
        ["bench", "--help"],
        ["bench", "dispatch", "--help"],
        ["bench", "dispatch", "--rounds", "0"],
        ["bench", "coordinator", "--help"],
    ],
)
def test_quick_answers_import_neither_torch_nor_ray(arguments: list[str]) -> None:
    script = (
        "import sys; from runtime.cli import COMMANDS, main; main(sys.argv[1:]); "
        "sys.exit(str(sorted({'torch', 'ray', 'numpy'} & set(sys.modules))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_prompts_come_from_standard_input_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ([], ["--prompts-file", "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("eins\n\nzwö\n".encode())))
        assert read_prompts(Path(given[1]) if given else None) == ["eins", "zwö"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match="standard input has no text to continue; write one prompt a line"):
        read_prompts(None)


def test_a_name_of_the_hub_is_told_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hf download deepseek-ai/DeepSeek-V3 --local-dir DeepSeek-V3"):
        import_model(Path("deepseek-ai/DeepSeek-V3"), tmp_path / "foo", [])


def test_an_import_takes_any_number_of_workers() -> None:
    config = load_config("small")  # a batch of 16
    config = replace(config, cluster=replace(config.cluster, num_workers=3))
    assert _with_batch_of_any_workers(config, []).run.global_batch_size == 18
    assert _with_batch_of_any_workers(config, ["--run.global_batch_size=16"]) == config  # refused by its rule
