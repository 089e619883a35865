"""The verdict sees what a run leaves on its machines: a process, a folder, a port, shared memory."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.commands.chaos import leftovers
from runtime.commands.chaos import testbed as testbeds
from runtime.commands.chaos.leftovers import Leftovers, left_by_cluster, left_on_machine
from runtime.commands.chaos.machines import Machines
from runtime.commands.chaos.namespaces import why_not
from runtime.commands.chaos.plan import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

LISTEN = "import socket, time; listener = socket.create_server(('', 7123)); print('up', flush=True); time.sleep(60)"


@pytest.fixture
def testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[testbeds.Testbed]:
    monkeypatch.setattr(leftovers, "LEAVE_S", 0.3)
    (tmp_path / "0").mkdir()
    with Machines(1) as machines:
        yield testbeds.Testbed(machines, tmp_path, PRESETS["quick"])


def begin(testbed: testbeds.Testbed, code: str) -> int:
    """A process of a run on the machine; its number on the host."""
    log = testbed.folder / "log"
    log.unlink(missing_ok=True)
    testbed.machines[0].popen([sys.executable, "-S", "-c", code], output=log)
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    [process] = [each for each in testbed.machines[0].processes() if code in each.command]
    return process.host_pid


def test_what_a_dead_driver_left_is_told_until_it_is_gone(testbed):
    run_dir = testbed.folder / "run"
    partial = run_dir / "checkpoints" / ".step_00000004.ab.partial"
    found = Leftovers(testbed, run_dir)
    assert found.still_there() == found.after_the_end() == []
    worker = begin(testbed, LISTEN)
    partial.mkdir(parents=True)
    found.note()
    new = begin(testbed, "print('up', flush=True); import time; time.sleep(59)")  # of the next start: that may stay
    left = found.still_there()
    assert len(left) == 2 and "of machine0: " in left[0] and "7123" in left[0] and left[1] == str(partial)
    partial.rmdir()
    os.kill(worker, signal.SIGKILL)
    assert found.still_there() == []
    assert len(found.after_the_end()) == 1
    os.kill(new, signal.SIGKILL)
    assert found.after_the_end() == []


def test_the_processes_of_the_cluster_are_not_of_the_run(testbed):
    for command in (
        "/site-packages/ray/core/src/ray/raylet/raylet --node",
        "/venv/bin/python -m ray.scripts.scripts start",
        "/venv/bin/python -u /site-packages/ray/_private/log_monitor.py",
        "ray::IDLE",
        "ray::DashboardAgent",
        "ray-dashboard-JobHead-0 (python)",
        "",
    ):
        assert leftovers._CLUSTER_COMMANDS.match(command), command
    for command in ("ray::WorkerActor", "ray::CoordinatorActor", "/venv/bin/python -P -m runtime train --config=tiny"):
        assert not leftovers._CLUSTER_COMMANDS.match(command), command


def test_after_the_cluster_nothing_at_all_may_be_there(testbed):
    machine = testbed.machines[0]
    assert left_by_cluster(testbed) == left_on_machine(testbed, machine, set(), [], []) == []
    begin(testbed, LISTEN)
    machine.run(["touch", "/dev/shm/plasma"])
    (testbed.disk(machine) / "trimtab-ray-abc").mkdir()
    left = left_by_cluster(testbed)
    assert [text.partition(" ")[0] for text in left[:3]] == ["process", "port", "shared"]
    assert left[1] == "port 7123 of machine0 is open" and left[3].endswith("/0/trimtab-ray-abc") and len(left) == 4
    assert len(left_on_machine(testbed, machine, set(), [], [])) == 3
