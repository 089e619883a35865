"""How a run ends when its terminal, its driver or its Ray goes, and what the next start finds of it."""

import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.runtime.job.test_job import _arguments
from workers.record.run_log import read_events, read_metrics

pytestmark = pytest.mark.slow

NAME = "ends"


@pytest.fixture
def place() -> Iterator[Path]:
    """A working directory whose modules have the names of ours, and a folder for Ray whose path is short enough."""
    with tempfile.TemporaryDirectory(prefix="tt-", dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        for name in ("workers", "cluster"):
            (Path(folder) / f"{name}.py").write_text("raise RuntimeError('not the package of Trimtab')\n")
        yield Path(folder)


@contextmanager
def training(place: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process], int]]:
    """The run, begun or resumed, on a terminal of its own; its processes; the terminal. It has made 8 more steps."""
    run_dir = place / "runs" / NAME
    new = [f"--name={NAME}", "--steps=100000", "--run.checkpoint_every=5", "--run.eval_every=0"]
    arguments = ["--resume", NAME] if run_dir.exists() else _arguments(place, *new)
    num_starts = len(starts(run_dir))
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [Path(sys.executable).with_name("trimtab"), "train", *arguments],
        cwd=place,
        env=os.environ | {"RAY_TMPDIR": str(place / "ray")},
        stdin=its,
        stdout=its,
        stderr=(place / "errors").open("w"),
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # noqa: PLW1509 its controlling terminal
    )
    os.close(its)
    os.set_blocking(ours, False)
    try:
        wait_for(lambda: drain(ours) or has_trained(run_dir, num_starts), process, place / "errors")
        yield process, psutil.Process(process.pid).children(recursive=True), ours
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def drain(terminal: int) -> None:
    """A terminal that nobody reads holds up who writes."""
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        return


def wait_for(condition: Callable[[], object], process: subprocess.Popen, errors: Path, limit_s: float = 150.0) -> None:
    give_up = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None and time.monotonic() < give_up, (process.poll(), errors.read_text())
        time.sleep(0.1)


def newest_step(run_dir: Path) -> int:
    lines = read_metrics(run_dir)[0] if (run_dir / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0


def starts(run_dir: Path) -> list[dict]:
    events = read_events(run_dir) if (run_dir / "events.jsonl").exists() else []
    return [event for event in events if event["event"] in ("started", "resumed")]


def has_trained(run_dir: Path, num_starts: int) -> bool:
    """Whether it was started once more, and has made 8 steps since: the workers of a killed driver also make some."""
    found = starts(run_dir)
    return len(found) > num_starts and newest_step(run_dir) >= found[-1].get("step", 0) + 8


def code_of(process: subprocess.Popen, terminal: int, limit_s: float = 240.0) -> int:
    give_up = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < give_up:
        drain(terminal)
        time.sleep(0.1)
    return process.wait(0)


def named(family: list[psutil.Process], *names: str) -> list[psutil.Process]:
    return [process for process in family if any(name in " ".join(process.cmdline()[:1]) for name in names)]


def test_no_end_of_terminal_driver_or_ray_loses_a_step_or_leaves_a_process(place):
    run_dir, folders = place / "runs" / NAME, lambda: sorted((place / "ray").glob("trimtab-ray-*"))

    with training(place) as (process, family, terminal):
        os.close(terminal)  # the kernel sends SIGHUP, and whatever is written there fails
        assert process.wait(240) == 129, (place / "errors").read_text()
    last = read_events(run_dir)[-1]
    assert (last["event"], last["saved_step"]) == ("interrupted", newest_step(run_dir))
    assert not psutil.wait_procs(family, timeout=60)[1] and folders() == []

    with training(place) as (process, family, _):
        process.kill()
    (left,) = folders()

    with training(place) as (process, again, terminal):
        assert left not in folders() and len(folders()) == 1
        assert not psutil.wait_procs(family, timeout=1)[1], "Ray's agents of the killed driver"
        check_the_end(process, again, named(again, "/gcs_server"), "gcs_server", run_dir, terminal)
        assert folders() == []

    with training(place) as (process, family, terminal):
        check_the_end(process, family, named(family, "Agent"), "raylet", run_dir, terminal)
        assert folders() == []
    steps = [line["step"] for line in read_metrics(run_dir)[0]]
    assert steps == list(range(1, len(steps) + 1))


def check_the_end(
    process: subprocess.Popen, family: list, victims: list, name: str, run_dir: Path, terminal: int
) -> None:
    pid = named(family, f"/{name}")[0].pid
    assert victims
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    assert code_of(process, terminal) == 1
    said = (run_dir.parents[1] / "errors").read_text()
    assert f"Ray's {name} (pid {pid}) on this machine has died" in said and "Traceback" not in said
    last = read_events(run_dir)[-1]
    assert last["event"] == "failed" and f"RayDied: Ray's {name} (pid {pid})" in last["reason"]
    if name == "gcs_server":  # the workers outlived it, and saved what they had
        assert [event["event"] for event in read_events(run_dir)[-2:]] == ["interrupted", "failed"]
    assert not psutil.wait_procs(family, timeout=60)[1]
