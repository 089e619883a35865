"""Three machines with a network, processes and names of their own, as a user makes a cluster of them and trains on it.

machine0 head, ranks 0 1    machine1, ranks 2 3    machine2, ranks 4 5    all 6 ranks: one expert-parallel group
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.commands.chaos.machines import Machine, Machines
from runtime.commands.chaos.namespaces import why_not
from tests.ray_fixture import ROOT
from tests.runtime.commands.cluster.launched import Place, new_place
from tests.workers.checkpoints.checkpoint_contents import tensors_of
from workers.record.run_log import read_events, read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

# Without ray[default] there is no job API; the run of one worker is then started directly.
HAS_JOBS = importlib.util.find_spec("aiohttp") is not None
LIMIT_S = 180.0
STEPS = 4
# Sums over a batch are made in another order on other ranks, in float32, and Adam divides what is left of a gradient
# that all but cancels by its own size: rounding can become a good part of a weight's update. Measured after these
# steps: 1.0e-6 at most in two experts, 6e-8 to 2e-7 elsewhere, where an update is up to the learning rate, 2e-3.
TOLERANCE = 1e-5


@pytest.fixture
def place() -> Iterator[Place]:
    place = new_place()
    yield place
    place.clean()


def command(machine: Machine, place: Place, *arguments: str) -> str:
    disk = place.folder / str(machine.index)  # what machines have of their own is not in a shared folder
    disk.mkdir(exist_ok=True)
    environment = place.environment(RAY_TMPDIR=str(disk), COLUMNS="200")
    done = machine.run([sys.executable, "-m", "runtime", *arguments], env=environment, timeout_s=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_options(folder: Path, name: str) -> list[str]:
    data = ["--data.path", str(ROOT / "workers"), "--data.cache_dir", str(folder / "cache")]
    batch = ["--steps", str(STEPS), "--run.global_batch_size", "6", "--run.eval_every", "0", "--run.seed", "3"]
    return ["train", "--config", "tiny", "--run.dir", str(folder), "--name", name, "--device", "cpu", *data, *batch]


def test_three_machines_with_two_workers_each_train_what_one_worker_trains(place: Place, tmp_path: Path) -> None:
    with Machines(3) as machines:
        head, *others = machines
        command(head, place, "cluster", "up", "--bind", head.address, "--num-cpus", "2")
        for machine in others:
            command(machine, place, "cluster", "join", head.address, "--num-cpus", "2")
        check_doctor(command(head, place, "doctor", "cluster", "--address", "auto", "--workers", "6"), machines)
        trained = command(others[0], place, *run_options(tmp_path, "six"), "--workers", "6", "--cluster.address=auto")
        assert "finished: step 4" in trained
        job = ["submit", "--working-dir", str(ROOT), "--"] if HAS_JOBS else []
        submitted = command(
            head, place, *job, *run_options(tmp_path, "one"), "--workers", "1", "--cluster.address=auto"
        )
        assert "finished: step 4" in submitted
        told = command(others[1], place, "cluster", "status")
        assert all(text in told for text in ("3 nodes alive", *(machine.address for machine in machines)))
        for machine in reversed(machines):
            assert f"at {machine.address}" in command(machine, place, "cluster", "down")
            assert "nothing of `trimtab cluster` runs" in command(machine, place, "cluster", "down")
    check_ranks(tmp_path / "six", machines)
    check_same_training(tmp_path)


def check_doctor(told: str, machines: Machines) -> None:
    assert "6 ranks on cpu joined" in told, told
    assert "error" not in told, told
    assert all(machine.address in told for machine in machines)


def check_ranks(run_dir: Path, machines: Machines) -> None:
    started = read_events(run_dir)[0]
    assert [row["node"] for row in started["rank_map"]] == [f"10.231.0.{10 + index}" for index in (0, 0, 1, 1, 2, 2)]
    assert all(row["interface"] == "eth0" for row in started["rank_map"])  # never loopback


def check_same_training(folder: Path) -> None:
    six, one = (read_metrics(folder / name)[0] for name in ("six", "one"))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in six] == pytest.approx([line[name] for line in one], rel=1e-5)
    assert [line["bias_checksum"] for line in six] == [line["bias_checksum"] for line in one]
    six_tensors, one_tensors = (
        tensors_of(folder / name / "checkpoints" / f"step_{STEPS:08d}") for name in ("six", "one")
    )
    weights = [name for name in one_tensors if name.startswith("model.")]
    assert set(weights) == {name for name in six_tensors if name.startswith("model.")}
    differences = {name: (six_tensors[name] - one_tensors[name]).abs().max().item() for name in weights}
    assert max(differences.values()) < TOLERANCE, differences
