"""Processes are known by number and start time; a session and its descendants end together."""

import subprocess
import sys
import time

import psutil
import pytest

from cluster.machine.processes import Process, end, family, process_of

# Leaves the session in turn: a grandchild that opened one of its own, and one that ignores SIGTERM.
TREE = """
import subprocess, sys, time
subprocess.Popen(["sleep", "600"])
subprocess.Popen(["sleep", "601"], start_new_session=True)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(602)"
subprocess.Popen([sys.executable, "-c", deaf])
time.sleep(603)
"""


@pytest.fixture
def leader():
    started = subprocess.Popen([sys.executable, "-c", TREE], start_new_session=True, stdout=subprocess.PIPE)
    assert started.stdout is not None and started.stdout.readline() == b"deaf\n"
    yield process_of(started.pid)
    end(process_of(started.pid), 1)
    started.wait(10)


def test_the_family_is_the_session_with_all_descendants_and_ends_whole(leader):
    members = family(leader)
    assert len(members) == 4
    assert {child.pid for child in psutil.Process(leader.pid).children(recursive=True)} < {m.pid for m in members}
    assert len(end(leader, 0.5)) >= 1  # the deaf one, by force
    assert not any(member.alive for member in members)
    assert end(leader, 0.5) == []  # again: nothing left to do


def test_the_family_is_found_after_its_leader_was_killed(leader):
    psutil.Process(leader.pid).kill()
    deadline = time.monotonic() + 10
    while leader.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not leader.alive
    left = family(leader)
    assert len(left) == 2  # who had left the session is nobody's child any more
    end(leader, 0.5)
    assert family(leader) == []
    [gone] = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "601"]]
    gone.kill()


def test_a_number_that_was_given_out_again_is_not_touched(leader):
    before = Process(leader.pid, leader.started - 1)
    assert not before.alive
    assert family(before) == []
    assert end(before, 0.1) == []
    assert leader.alive
