"""Another driver that is not refused, does not say why, or changes the run's settings has not kept its promise."""

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.commands.chaos.second_writer import StartedDriver, refuse
from runtime.commands.chaos.target import TargetRun, Unfulfilled

REFUSED = "echo error: chaos is being written by pid 7 on machine0 since 1; exit 2"


class Run(TargetRun):
    """A run whose drivers are none, and whose own process lives."""

    def drivers(self):
        return []

    @property
    def exit_code(self):
        return None


@pytest.fixture
def run(tmp_path: Path) -> Run:
    testbed = SimpleNamespace(folder=tmp_path, runs=tmp_path, machines=[])
    run = Run(testbed, "chaos", deadline=time.monotonic() + 60, on_wait=lambda *_: None)
    run.run_dir.mkdir()
    (run.run_dir / "config.yaml").write_text("steps: 5\n")
    return run


def other(run: Run, script: str) -> list[StartedDriver]:
    log = run.testbed.folder / "other"
    with log.open("w") as file:
        return [(subprocess.Popen(["sh", "-c", script], stdout=file, cwd=run.run_dir), log)]


def test_a_driver_that_says_why_and_changes_nothing_is_refused(run):
    refuse(run, lambda: other(run, REFUSED))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo chaos is being written by pid 7 on machine0", "exit code 0"),
        ("echo Traceback; exit 1", "exit code 1, saying: Traceback"),
        (f"echo 'steps: 6' > config.yaml; {REFUSED}", "changed config.yaml"),
    ],
)
def test_any_other_end_is_told(run, script, reason):
    with pytest.raises(Unfulfilled, match=reason):
        refuse(run, lambda: other(run, script))
