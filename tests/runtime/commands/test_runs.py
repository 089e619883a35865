import errno
import json
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.runs import run_lock
from runtime.runs.run_lock import owner_of
from tests.synthetic_run import SyntheticRun, make_run
from workers.record.run_log import append_event

HOLDER = """
    import sys
    from pathlib import Path
    from runtime.runs.run_lock import hold
    from runtime.terminal.interrupt import stop_signals_raise
    from workers.record.run_log import append_event
    with stop_signals_raise(), hold(Path(sys.argv[1]), print):
        try:
            print("held", flush=True)
            sys.stdin.read()
        except KeyboardInterrupt:
            append_event(Path(sys.argv[1]), "interrupted", step=20)
"""


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def holder(run: Path) -> subprocess.Popen[str]:
    """A process that owns `run` until SIGTERM, as one that trains it does."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run of 20 of 40 steps."""
    path = make_run(tmp_path / "half", SyntheticRun(steps=20, total_steps=40, finished=False))
    (path / "config.yaml").write_text("run: {steps: 40}\n")
    return path


def test_long_names_are_whole_on_a_narrow_terminal_and_in_a_pipe(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    made.rename(tmp_path / (name := ":cat: " + "n" * 200))
    assert main(["runs", "--runs-dir", str(tmp_path)]) == 0
    head, row = lines_of(capsys)
    assert row.startswith(f"{name}  interrupted  20/40")
    assert row.split()[-2:] == ["days", "ago"]
    assert head.split()[:3] == ["run", "state", "step"]


def test_a_mistyped_folder_of_runs_is_not_taken_for_an_empty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "--runs-dir", str(tmp_path / "rnus")]) == 2
    assert "rnus must be a folder; `trimtab runs` without it lists runs/" in capsys.readouterr().err


def test_runs_are_listed_with_their_state_and_last_figures(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = make_run(tmp_path / "evil\x1b[2Jname", SyntheticRun(steps=5, total_steps=5, eval_every=5))
    (ended / "config.yaml").write_text("run: {steps: 5}\n")
    append_event(ended, "finished", step=5)
    (tmp_path / "no run").mkdir()
    assert main(["runs", "--runs-dir", str(tmp_path)]) == 0
    head, *rows = lines_of(capsys)
    assert head.split()[:4] == ["run", "state", "step", "loss"]
    assert [row.split()[:3] for row in rows] == [["half", "interrupted", "20/40"], ["evil?[2Jname", "finished", "5/5"]]
    assert main(["runs", "--runs-dir", str(tmp_path), "--json"]) == 0
    half, other = map(json.loads, lines_of(capsys))
    last = json.loads((made / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 20
    assert (half["step"], half["total_steps"], half["loss"]) == (20, 40, last["loss"])
    assert (other["name"], other["state"]) == (ended.name, "finished")
    assert other["val_bits_per_byte"] > 0


def test_a_folder_without_runs_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--runs-dir", str(tmp_path)]) == 0
    assert lines_of(capsys) == [f"no runs in {tmp_path}/; start one with: trimtab train"]


def test_stop_ends_the_process_that_trains_and_waits_for_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = holder(made)
    assert main(["stop", str(made)]) == 0
    first, last = lines_of(capsys)
    assert first.startswith(f"stopping pid {process.pid} on ")
    assert last == f"interrupted at step 20; go on with: trimtab train --resume {made}"
    assert process.wait(30) == 0
    assert owner_of(made) is None


def test_a_run_that_does_not_end_in_time_stays_with_its_process(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = holder(made)
    process.send_signal(signal.SIGSTOP)  # SIGTERM has to wait
    try:
        assert main(["stop", str(made), "--timeout", "1"]) == 1
        assert "still saves after 1 s" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()


def test_nobody_is_stopped_where_nobody_trains_or_somebody_elsewhere(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", str(made)]) == 2
    assert f"nobody trains {made}: there is nothing to stop" in capsys.readouterr().err
    process = holder(made)
    try:
        monkeypatch.setattr(run_lock, "_boot_id", lambda: "another machine")
        assert main(["stop", str(made)]) == 1
        assert f"stop it there: ssh {socket.gethostname()} kill {process.pid}" in capsys.readouterr().err
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_run_of_another_user_cannot_be_stopped_and_the_answer_says_who_can(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    process = holder(made)
    try:
        with monkeypatch.context() as patched:
            patched.setattr("os.kill", refuse)
            assert main(["stop", str(made)]) == 1
        told = capsys.readouterr().err
        assert (
            f"pid {process.pid} on" in told
            and f"another user; ask them to stop it, or do it as root: sudo kill {process.pid}" in told
        )
    finally:
        process.kill()
        process.communicate()


def test_a_run_that_ends_before_it_is_told_to_has_stopped(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = holder(made)

    def too_late(pid: int, number: int) -> None:
        monkeypatch.undo()
        process.kill()
        process.communicate()
        raise ProcessLookupError(errno.ESRCH, "No such process")

    monkeypatch.setattr("os.kill", too_late)
    assert main(["stop", str(made)]) == 0
    assert "interrupted at step 20" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_not_called_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)
    assert main(["runs", "--runs-dir", str(tmp_path)]) == 1
    assert f"{tmp_path}: Permission denied; change its permissions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "instead"), [("checkpoints/step_00000012", " with --step 12"), ("events.jsonl", ""), ("checkpoints", "")]
)
def test_a_part_of_a_run_is_refused_with_the_run_to_name_instead(
    part: str, instead: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "checkpoints" / "step_00000012").mkdir(parents=True)
    for command in (["report", str(made / part)], ["train", "--resume", str(made / part)]):
        assert main(command) == 2
        assert f"{part} is a part of the run {made}; give {made}{instead} instead\n" in capsys.readouterr().err
    assert main(["report", str(made / "no")]) == 2
    assert "there is no run" in capsys.readouterr().err
