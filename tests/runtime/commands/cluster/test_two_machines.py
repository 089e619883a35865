"""Two machines with addresses, names and processes of their own, and a training over both.

machine0 head, rank 0    machine1 node, rank 1    no default route, one home
"""

import sys
from pathlib import Path

import pytest

from runtime.commands.chaos.machines import Machine, Machines
from runtime.commands.chaos.namespaces import why_not
from tests.ray_fixture import ROOT
from tests.runtime.commands.cluster.launched import Place, new_place

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


def command(machine: Machine, place: Place, *arguments: str) -> str:
    disk = place.folder / str(machine.index)  # what machines have of their own is not in a shared folder
    disk.mkdir(exist_ok=True)
    environment = place.environment(RAY_TMPDIR=str(disk), COLUMNS="200")
    done = machine.run([sys.executable, "-m", "runtime", *arguments], env=environment, timeout_s=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# P29
def test_two_machines_are_a_cluster_that_trains(tmp_path: Path) -> None:
    place = new_place()
    try:
        with Machines(2) as machines:
            head, node = machines
            up = command(head, place, "cluster", "up", "--bind", head.address, "--num-cpus", "1")
            assert f"trimtab cluster join {head.address}:6379" in up
            join = command(node, place, "cluster", "join", head.address, "--num-cpus", "1")
            assert f"{node.address} is a node of the cluster" in join  # by the way to the head: it has no other
            told = command(node, place, "cluster", "status")
            assert all(text in told for text in (head.address, node.address, "machine0", "machine1", "2 nodes alive"))
            data = ("--data.path", str(ROOT / "workers"), "--data.cache_dir", str(tmp_path / "cache"))
            run = ("--run.dir", str(tmp_path), "--name", "over-two", "--steps", "2", "--config", "tiny")
            trained = command(node, place, "train", "--cluster.address", "auto", *data, *run)
            assert f"rank 0  {head.address}" in trained and f"rank 1  {node.address}" in trained
            assert "finished: step 2" in trained
            for machine in (node, head):
                assert f"at {machine.address}" in command(machine, place, "cluster", "down")
                assert "nothing of `trimtab cluster` runs" in command(machine, place, "cluster", "down")
    finally:
        place.clean()
