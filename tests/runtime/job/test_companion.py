import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from runtime.job import companion
from runtime.job.companion import Companion, page_beside
from tests.synthetic_run import make_run


def test_what_a_companion_prints_is_heard_line_by_line() -> None:
    heard: list[str] = []
    with Companion("dates", ["calendar", "2026", "2"], heard.append):
        pass
    assert heard[0].split() == ["February", "2026"] and "28" in heard[-1]


def test_a_companion_that_fails_is_told_of_and_nothing_else_happens() -> None:
    heard: list[str] = []
    with Companion("page", ["runtime.no_such_module"], heard.append):
        pass
    assert len(heard) == 1
    assert (
        heard[0].startswith("page: ended with exit code 1 (") and "No module named runtime.no_such_module" in heard[0]
    )


def test_one_that_does_not_end_is_left_alone_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companion, "END_S", 0.1)
    heard: list[str] = []
    with Companion("slow", ["timeit", "-n1", "-r1", "import time; time.sleep(2)"], heard.append):
        pass
    assert len(heard) == 1 and heard[0].startswith("slow: still at work after the run's end; process ")


def test_one_that_may_not_outlive_the_run_is_killed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companion, "END_S", 0.1)
    heard: list[str] = []
    sleep = ["timeit", "-n1", "-r1", "import time; time.sleep(60)"]
    began = time.monotonic()
    with Companion("slow", sleep, heard.append, may_outlive=False):
        pass
    assert time.monotonic() - began < 30 and "ended with exit code -9" in heard[0]


def test_the_page_beside_a_run_says_its_url_and_its_death_is_told(tmp_path: Path) -> None:
    said: queue.Queue[str] = queue.Queue()
    make_run(tmp_path / "run")
    with page_beside(tmp_path / "run", said.put, is_wanted=True) as page:
        assert said.get(timeout=60).startswith("watch  http://127.0.0.1:")
        os.kill(page._process.pid, signal.SIGKILL)
        assert said.get(timeout=60) == "watch: ended with exit code -9; the run goes on"


def test_the_page_beside_a_run_ends_with_it(tmp_path: Path) -> None:
    said: queue.Queue[str] = queue.Queue()
    make_run(tmp_path / "run")
    with page_beside(tmp_path / "run", said.put, is_wanted=True) as page:
        said.get(timeout=60)
    assert page._process.returncode == 0 and said.empty()


def test_a_companion_ends_when_its_driver_is_killed(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    code = (
        "import sys, time\nfrom runtime.job.companion import Companion\n"
        f"with Companion('loggers', ['runtime.loggers', {str(tmp_path / 'run')!r}], print) as each:\n"
        "    print(each._process.pid, flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        companion = psutil.Process(int(driver.stdout.readline()))
        assert "runtime.loggers" in companion.cmdline()
        os.kill(driver.pid, signal.SIGKILL)
        began = time.monotonic()
        companion.wait(15)
    assert time.monotonic() - began < 15
