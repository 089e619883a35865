"""What killed drivers left is removed; what lives, or is not ours to judge, stays."""

import subprocess
import sys

import pytest

from cluster.ray.ray_folder import LOCK, own_folder, remove_left_overs

# Opens a folder as a driver does, and a file in it under the name of one of Ray's processes.
DRIVER = """
import subprocess, sys
from cluster.ray.ray_folder import own_folder
with own_folder() as folder:
    log = (folder / "agent.log").open("w")
    agent = subprocess.Popen(["ray::DashboardAgent", "60"], executable="/bin/sleep", stdout=log)
    reader = subprocess.Popen(["sleep", "60"], stdout=log)
    print(folder, agent.pid, reader.pid, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def ray_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def test_the_folder_of_a_killed_driver_and_its_agents_go_and_that_of_a_living_one_stays(tmp_path):
    import psutil

    (unlocked := tmp_path / "trimtab-ray-older").mkdir()
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    folder, agent, reader = driver.stdout.readline().split()
    processes = [psutil.Process(int(agent)), psutil.Process(int(reader))]
    try:
        remove_left_overs()
        assert all(process.is_running() for process in processes)
        assert (tmp_path / folder / LOCK).exists()
        driver.kill()
        driver.communicate()
        with own_folder() as own:
            assert sorted(tmp_path.iterdir()) == sorted([own, unlocked])
            assert not psutil.wait_procs(processes[:1], timeout=5)[1]
            assert processes[1].is_running(), "a reader of a log is no process of Ray"
        assert list(tmp_path.iterdir()) == [unlocked]
    finally:
        for process in processes:
            if process.is_running():
                process.kill()
