"""The file of `trimtab cluster manifest ray-up`, given to `ray up`, over ssh.

machine0 head, rank 0    machine1 worker, rank 1, then lost    machine2 has the key; `ray up` runs there
"""

import contextlib
import hashlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.commands.chaos.machines import Machines
from runtime.commands.chaos.namespaces import why_not
from tests.ray_fixture import ROOT
from tests.runtime.commands.cluster.launched import Place, new_place, programs_in
from tests.runtime.commands.cluster.run_check import check_every_step_once, nodes_of_ranks, steps_done
from tests.runtime.commands.cluster.ssh import SshMachines, why_no_ssh

REASON = why_not() or why_no_ssh()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

STEPS = 60
LIMIT_S = 180.0  # Of each part; all take 70 s together on busy cores.


@pytest.fixture
def place() -> Iterator[Place]:
    place = new_place()
    yield place
    place.clean()
    shutil.rmtree(control_folder(place), ignore_errors=True)
    with contextlib.suppress(OSError):  # other clusters' sockets are there
        control_folder(place).parent.rmdir()


def control_folder(place: Place) -> Path:
    """Where Ray lets ssh keep its sockets: beside those of all other clusters of the user."""
    user, cluster = (hashlib.sha256(name.encode()).hexdigest()[:10] for name in ("root", name_of(place)))
    return Path(f"/tmp/ray_ssh_{user}/{cluster}")


def name_of(place: Place) -> str:
    """Of the cluster, another one for each test: Ray keeps files under it."""
    return place.folder.name.replace("_", "-").lower().rstrip("-")


def profile(place: Place) -> str:
    """What an installation's users have in their profile, and a folder for Ray that each machine has for itself."""
    variables = {
        "PATH": f"{programs_in(place.folder / 'bin')}:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "RAY_TMPDIR": "/run",
        "TMPDIR": "/run",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return "".join(f"export {name}={value}\n" for name, value in variables.items())


def write_file(place: Place, machines: Machines, key: Path) -> Path:
    out = place.folder / "cluster.yaml"
    login = ["--ssh-user", "root", "--ssh-key", str(key)]
    sizes = ["--head", machines[0].address, "--worker", machines[1].address, "--cpus-per-node", "1"]
    assert main(["cluster", "manifest", "ray-up", *sizes, *login, "--name", name_of(place), "--out", str(out)]) == 0
    return out


def test_ray_up_starts_a_cluster_whose_run_outlives_a_node(place: Place) -> None:
    with Machines(3) as machines:
        ssh = SshMachines(machines, place.folder, profile(place))
        for machine in machines:
            ssh.serve(machine)
        head, _, user = machines
        ssh.give_key(user)
        ssh.check(user, "trimtab", "cluster", "token")
        up = ["ray", "up", "--yes", "--no-config-cache", str(write_file(place, machines, ssh.key))]
        print(ssh.check(user, *up, limit_s=LIMIT_S))
        try:
            wait_for(lambda: "2 nodes alive" in ssh.check(head, "trimtab", "cluster", "status"), every_s=2.0)
        finally:
            print(ssh.check(head, "bash", "-c", "tail -n 60 /run/tt-0/*/r/session_latest/logs/monitor.*"))
        check_training(place, machines, ssh)


def train_command(place: Place, run_dir: Path) -> list[str]:
    files = ["--run.dir", str(run_dir.parent), "--name", run_dir.name, "--data.cache_dir", str(place.folder / "cache")]
    text = ["--data.path", str(ROOT / "workers")]
    sizes = ["--workers", "2", "--cluster.min_workers", "1", "--device", "cpu", "--cluster.address", "auto"]
    steps = ["--config", "tiny", "--steps", str(STEPS), "--run.eval_every", "0"]
    return ["trimtab", "train", *files, *text, *sizes, *steps]


def check_training(place: Place, machines: Machines, ssh: SshMachines) -> None:
    output, run_dir = place.folder / "train.log", place.folder / "runs" / "lost"
    login = ["ssh", "-o", "StrictHostKeyChecking=no", f"root@{machines[0].address}"]
    there = shlex.join(["bash", "-lc", shlex.join(train_command(place, run_dir))])
    run = machines[2].popen(ssh.as_user(*login, there), output=output)
    try:
        wait_for(lambda: steps_done(run_dir) > 5, run)
        machines.network.cut(1)  # as a power cut: nobody is told
        machines[1].kill()
        assert run.wait(LIMIT_S) == 0
    finally:
        print(output.read_text())
    check_every_step_once(run_dir, STEPS)
    assert nodes_of_ranks(run_dir) == [["10.231.0.10", "10.231.0.11"], ["10.231.0.10"]]


def wait_for(
    condition: Callable[[], bool], run: subprocess.Popen[bytes] | None = None, *, every_s: float = 0.1
) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        assert run is None or run.poll() is None, "it ended before"
        time.sleep(every_s)
