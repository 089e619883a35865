"""`trimtab watch` on the command line: which runs, what is refused, how it ends."""

import importlib.util
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.cli import main
from tests.synthetic_run import SyntheticRun, make_run

TRIMTAB = Path(sys.executable).with_name("trimtab")


@contextmanager
def watching(folder: Path, *arguments: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [str(TRIMTAB), "watch", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            if process.poll() is None:
                process.kill()


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=str,
)
def test_it_prints_an_url_and_a_signal_ends_it_in_order_with_a_page_open(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    make_run(tmp_path / "runs" / "one", SyntheticRun(steps=5))
    with watching(tmp_path, "one") as (process, url):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", url)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        page = url.partition("?")[0]
        assert b"<!doctype html>" in opener.open(url, timeout=10).read()
        assert status_of(page) == 401
        stream = opener.open(f"{page}api/stream", timeout=10)
        assert stream.readline().startswith(b"data: ")
        process.send_signal(number)
        assert process.wait(10) == code
        assert process.stderr is not None
        assert process.stderr.read() == "trimtab: stopped\n"
        stream.close()


def test_one_that_a_program_starts_prints_the_url_alone_and_ends_with_its_input(tmp_path: Path) -> None:
    make_run(tmp_path / "one", SyntheticRun(steps=5))
    command = [str(TRIMTAB), "watch", "./one", "--until-input-ends"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:
        url = process.stdout.readline().rstrip("\n")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", url)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        opener.open(url, timeout=10).read()
        with opener.open(f"{url.partition('?')[0]}api/stream", timeout=10) as stream:
            assert stream.readline().startswith(b"data: ")  # a page is open
            process.stdin.close()
            assert process.wait(10) == 0
        assert process.stdout.read() == ""


def test_the_same_run_is_watched_by_two_at_once_and_changed_by_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", SyntheticRun(steps=5))
    before = sorted(str(path) for path in run.rglob("*"))
    with watching(tmp_path, "./one") as (_, first), watching(tmp_path, "./one") as (_, second):
        assert (status_of(first), status_of(second)) == (401, 401)  # urllib keeps no cookie
        assert first.split("=")[1] != second.split("=")[1]
        assert first.partition("?")[0] != second.partition("?")[0]
    assert sorted(str(path) for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no run 'nowhere'"),
        (["nowhere"], "to watch a run that is yet to begin, add --wait"),
        (["one", "--bind", "0.0.0.0"], "--bind 0.0.0.0 is every address at once; name the one that you will open"),
        (["one", "--bind", "::"], "is every address at once"),
        (["one", "--bind", "host"], "--bind 'host' must be an address, as 10.0.0.1"),
        (["one", "--bind", "192.0.2.1"], "cannot listen at 192.0.2.1"),
        (["one", "--port", "70000"], "--port 70000 is no port"),
        (["one"] * 17, "17 runs are more than a page shows; name at most 16"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run(tmp_path / "runs" / "one", SyntheticRun(steps=1))
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_token_of_ones_own_is_taken_and_a_weak_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "one", SyntheticRun(steps=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_WATCH_TOKEN", "of-my-own-0123456789")
    with watching(tmp_path, "./one") as (_, url):
        request = urllib.request.Request(f"{url.partition('?')[0]}metrics")
        request.add_header("authorization", "Bearer of-my-own-0123456789")
        assert b"trimtab_step{" in urllib.request.urlopen(request, timeout=10).read()
    for weak in ("short", "with blanks and more", "with;semicolon;0123456789"):
        monkeypatch.setenv("TRIMTAB_WATCH_TOKEN", weak)
        assert main(["watch", "./one"]) == 2
        assert "TRIMTAB_WATCH_TOKEN must have 16 to 128 letters" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "one", SyntheticRun(steps=1))
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert main(["watch", "one"]) == 1
    assert "needs uvicorn; install them with: pip install 'trimtab[watch]'" in " ".join(capsys.readouterr().err.split())
