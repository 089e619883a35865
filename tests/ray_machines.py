"""A real Ray cluster of several machines (runtime.commands.chaos.machines) on this host: about 20 s for three."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.commands.chaos.machines import Machine, Machines
from tests.ray_fixture import ROOT

RAY = str(Path(sys.executable).with_name("ray"))
START_S = 90.0
# Ray's own limits would take a minute to see a dead node.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_worker_niceness": "0",
    "RAY_health_check_failure_threshold": "5",
}


@dataclass(frozen=True)
class RayOnMachines:
    """address: of the head, on machine 0. env: with which to run a driver on any of them."""

    address: str
    env: dict[str, str]

    def join(self, machine: Machine) -> None:
        """Start a node on a machine, as after it was booted again."""
        _start(machine, self.env, "--address", self.address)


@contextmanager
def ray_on(machines: Machines, token_file: Path) -> Iterator[RayOnMachines]:
    """A node on each machine, with one CPU; all of it ends with the machines."""
    token_file.touch(0o600)
    token_file.write_text(os.urandom(32).hex())
    env = {
        **os.environ,
        **HEALTH,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    cluster = RayOnMachines(f"{machines[0].address}:6379", env)
    _start(machines[0], env, "--head", "--port=6379", "--include-dashboard=false")
    for machine in list(machines)[1:]:
        cluster.join(machine)
    yield cluster


def _start(machine: Machine, env: dict[str, str], *options: str) -> None:
    fixed = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    where = [f"--node-ip-address={machine.address}", f"--temp-dir={machine.disk / 'ray'}"]
    done = machine.run([RAY, "start", *options, *where, *fixed], env=env, timeout_s=START_S)
    assert done.returncode == 0, done.stdout + done.stderr
