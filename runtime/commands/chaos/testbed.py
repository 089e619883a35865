"""A Ray cluster of simulated machines on this host, and a small disk for the runs that they share."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import runtime
from cluster.machine.node_state import ray_folder
from dispatch.errors import UserError
from runtime.commands.chaos.machines import Machine, Machines
from runtime.commands.chaos.namespaces import command
from runtime.commands.chaos.plan import Preset

CLONE_NEWNS = 0x00020000  # of linux/sched.h
WORK_BYTES = 2**30  # Ray's logs and sockets, the prepared text; memory is taken only for what is in use.
RUNS_BYTES = 48 * 2**20  # Several times the checkpoints of the runs; small, so that it is soon full.
START_TRIES = 3
COMMAND_S = 240.0  # For `cluster up`, `join` and `down`: 10 s on a quiet machine.


class TestbedFailed(UserError, RuntimeError):
    """A node of the cluster could not be started or ended."""


class Testbed:
    """Machines with a Ray node each; made by `open_testbed`. `runs` is the disk of the runs, seen by all machines."""

    def __init__(self, machines: Machines, folder: Path, preset: Preset) -> None:
        self.machines, self.folder, self.runs = machines, folder, folder / "runs"
        self._preset = preset

    @property
    def address(self) -> str:
        """Of the cluster's head."""
        return f"{self.machines[0].address}:6379"

    def up(self) -> None:
        """Start the head and join the other machines to it."""
        self._start_node(self.machines[0], "up", "--bind", self.machines[0].address)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.join, list(self.machines)[1:]))

    def restart(self) -> None:
        """End what is left of the cluster, and start it anew."""
        self.down()
        self.up()

    def down(self) -> None:
        """End the nodes of all machines that are up, the head last."""
        for machine in reversed(list(self.machines)):
            if machine.is_up:
                self.command(machine, "cluster", "down")

    def join(self, machine: Machine) -> None:
        """Boot a machine if it is down, heal its link, and make it a node of the cluster."""
        if not machine.is_up:
            shutil.rmtree(self.disk(machine), ignore_errors=True)  # its disk is gone as well
            machine.boot()
        self.machines.network.heal(machine.index)
        self._start_node(machine, "join", self.machines[0].address)

    def _start_node(self, machine: Machine, *arguments: str) -> None:
        """Run `cluster up` or `cluster join`, several times if it fails: Ray waits 30 s, too short on a busy host."""
        for attempt in range(1, START_TRIES + 1):
            self.command(machine, "cluster", "down")
            try:
                self.command(machine, "cluster", *arguments, "--num-cpus", str(self._preset.workers_per_machine))
            except TestbedFailed:
                if attempt == START_TRIES:
                    raise
            else:
                return

    def command(self, machine: Machine, *arguments: str) -> None:
        """Run a quick command of trimtab on a machine.

        Raises:
            TestbedFailed: it failed, or took longer than COMMAND_S.
        """
        what = f"trimtab {' '.join(arguments)} on {machine.name}"
        try:
            done = machine.run(self._command_line(arguments), env=self._environment(machine), timeout_s=COMMAND_S)
        except subprocess.TimeoutExpired as error:
            raise TestbedFailed(f"{what}: not done after {COMMAND_S:g} s") from error
        if done.returncode:
            raise TestbedFailed(f"{what}: {done.stderr.strip() or f'exit code {done.returncode}'}")

    def start(
        self, arguments: Sequence[str], output: Path, *, index: int = 0, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command of trimtab on the machine of this index; 0 is the head."""
        machine = self.machines[index]
        return machine.popen(
            self._command_line(arguments), env={**self._environment(machine), **(variables or {})}, output=output
        )

    def disk(self, machine: Machine) -> Path:
        """Where a machine keeps its temporary files, Ray's among them."""
        # Not the disk of the machine, whose path is too long for Ray's sockets.
        return self.folder / str(machine.index)

    def _command_line(self, arguments: Sequence[str]) -> list[str]:
        return ["env", f"--chdir={self.folder}", sys.executable, "-P", "-m", "runtime", *arguments]

    def _environment(self, machine: Machine) -> dict[str, str]:
        disk = self.disk(machine)
        disk.mkdir(exist_ok=True)
        # None of the user's clusters, tokens or plans of faults.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TRIMTAB_"))}
        tree = str(Path(runtime.__file__).parents[1])
        own = {"HOME": str(self.folder), "RAY_TMPDIR": str(disk), "TMPDIR": str(disk), "PYTHONPATH": tree}
        # COLUMNS: rich would break long paths, which stand in the promises that are searched for in the output.
        return kept | own | {"COLUMNS": "200", "PYTHONWARNINGS": "ignore"}


@contextlib.contextmanager
def open_testbed(preset: Preset) -> Iterator[Testbed]:
    """Build a testbed, and leave nothing of it behind; the cluster is not up yet.

    Its disks are mounted for this process and its children alone and vanish with them, however they end.

    Raises:
        InvalidValue: this system cannot have such machines (`runtime.commands.chaos.namespaces.why_not`).
    """
    machines = Machines(preset.num_machines)
    _leave_shared_mounts()
    # A short path: that of a socket may have 107 characters, and Ray's dashboard appends up to 92 to this folder's.
    folder = Path(tempfile.mkdtemp(prefix="c-", dir=ray_folder()))
    with contextlib.ExitStack() as stack:
        stack.callback(folder.rmdir)
        for disk, num_bytes in ((folder, WORK_BYTES), (folder / "runs", RUNS_BYTES)):
            disk.mkdir(exist_ok=True)
            command(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "chaos", str(disk)])
            stack.callback(command, ["umount", "--lazy", str(disk)])
        # The training text: a copy, since somebody may edit this tree meanwhile.
        shutil.copytree(Path(runtime.__file__).parents[1] / "workers", folder / "source")
        yield Testbed(stack.enter_context(machines), folder, preset)


def _leave_shared_mounts() -> None:
    """Give this process a mount namespace of its own: the host does not see what is mounted from now on."""
    # os.unshare is in Python from 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "cannot leave the mount namespace")
    command(["mount", "--make-rprivate", "/"])
