"""Machines on one host, for faults that need several: own network, processes, host name, shared memory and disk each.

    with Machines(3) as machines:
        machines[1].popen([sys.executable, "rank.py"], output=folder / "rank1.txt")
        machines.network.cut(1)

They share the host's files and clock, and reach each other but nothing else. When the owner is gone, however it went,
so are they.
"""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from dispatch.errors import InvalidValue
from runtime.commands.chaos.namespaces import COMMAND_S, KINDS, Holder, why_not
from runtime.commands.chaos.network import Network, address_of

# Limits, not reservations: a tmpfs takes memory for what is written alone.
DISK_BYTES = 64 * 2**20
SHM_BYTES = 512 * 2**20


@dataclass(frozen=True)
class MachineProcess:
    """A process of a machine. pid: its process id inside the machine. host_pid: on the host; signals go to this one."""

    pid: int
    host_pid: int
    command: str


class Machine:
    """One machine. Its processes end with it.

    `address` is that of its interface eth0, `name` its host name, `disk` a file system of its own of `disk_bytes`, that
    only its own processes see.
    """

    def __init__(self, index: int, folder: Path, network: Network, names: Sequence[str], disk_bytes: int) -> None:
        self.index, self.name, self.address = index, names[index], address_of(index)
        self.disk = folder / f"disk{index}"
        self._network, self._disk_bytes = network, disk_bytes
        self._hosts = folder / "hosts"
        self._holder: Holder | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def is_up(self) -> bool:
        """True from `boot` until `kill` or `close`."""
        return self._holder is not None

    def boot(self) -> None:
        """Start it, or start it again after a kill: empty disk, no processes, its link as it was set."""
        if self._holder is not None:
            raise ValueError(f"{self.name} is up; kill it before it is booted again")
        self.disk.mkdir(exist_ok=True)
        setup = (
            f"hostname {self.name}\n"
            f"mount --bind {self._hosts} /etc/hosts\n"
            f"mount -t tmpfs -o size={self._disk_bytes} disk {self.disk}\n"
            f"mount -t tmpfs -o size={SHM_BYTES} shm /dev/shm\n"
            "ip link set lo up"
        )
        self._holder = Holder(KINDS, setup=setup)
        self._network.attach(self.index, self._holder)

    def popen(
        self, arguments: Sequence[str], *, env: Mapping[str, str] | None = None, output: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on it. A signal to it would reach nsenter alone: end it by `kill`, or from inside.

        Args:
            env: its whole environment; that of this process if None.
            output: file for what it writes to both streams, appended; nowhere if None.
        """
        with contextlib.ExitStack() as stack:
            sink: IO[bytes] | int = subprocess.DEVNULL if output is None else stack.enter_context(output.open("ab"))
            process = subprocess.Popen(  # noqa: S603 The caller's own command.
                self._running_holder().enter(KINDS, arguments),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(
        self, arguments: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on it to its end; what it leaves running goes on.

        Raises:
            subprocess.TimeoutExpired: it took longer; it may run on, until the machine is killed.
        """
        return subprocess.run(  # noqa: S603 The caller's own command.
            self._running_holder().enter(KINDS, arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=env,
            timeout=timeout_s,
            check=False,
        )

    def processes(self) -> list[MachineProcess]:
        """All its processes, but for the one that holds it."""
        holder = self._running_holder()
        space = Path(f"/proc/{holder.pid}/ns/pid").readlink()
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        found = [_process(pid, space) for pid in sorted(pids) if pid != holder.pid]
        return [process for process in found if process is not None]

    def listening(self) -> list[int]:
        """TCP ports at which any of its processes waits for connections."""
        ports = []
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self._running_holder().pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":  # TCP_LISTEN of net/tcp_states.h
                    ports.append(int(fields[1].rpartition(":")[2], 16))
        return sorted(ports)

    def shared_memory(self) -> list[str]:
        """Names of what lies in its /dev/shm."""
        return sorted(each.name for each in Path(f"/proc/{self._running_holder().pid}/root/dev/shm").iterdir())

    def kill(self) -> None:
        """End it with all its processes, by SIGKILL."""
        holder = self._running_holder()
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """End it if it is up, and wait for its processes."""
        holder, self._holder = self._holder, None
        if holder is None:
            return
        holder.close()
        self._network.detach(self.index)
        deadline = time.monotonic() + COMMAND_S
        for process in self._started:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(COMMAND_S)
        self._started.clear()

    def _running_holder(self) -> Holder:
        if self._holder is None:
            raise ValueError(f"{self.name} is down; boot it first")
        return self._holder


def _process(host_pid: int, space: Path) -> MachineProcess | None:
    """The process if it is of this PID namespace and lives."""
    folder = Path(f"/proc/{host_pid}")
    try:
        if (folder / "ns/pid").readlink() != space:
            return None
        numbers = re.search(r"^NSpid:\s*(.*)$", (folder / "status").read_text(), re.MULTILINE)
        words = (folder / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return None
    inner = int(numbers[1].split()[-1]) if numbers else host_pid
    return MachineProcess(inner, host_pid, b" ".join(words).decode(errors="replace").strip())


class Machines(Sequence[Machine]):
    """Several machines on one switch; a context manager. `network` cuts, slows and delays their links."""

    def __init__(self, num_machines: int, *, disk_bytes: int = DISK_BYTES) -> None:
        """Describe them; entering the context boots them.

        Raises:
            InvalidValue: this system cannot have such machines (`why_not`), or the number is not from 1 to 200.
        """
        if not 1 <= num_machines <= 200:
            raise InvalidValue(f"num_machines ({num_machines}) must be from 1 to 200: they share one network of 254")
        if (reason := why_not()) is not None:
            raise InvalidValue(reason)
        self._num_machines, self._disk_bytes = num_machines, disk_bytes
        self._machines: list[Machine] = []

    def __enter__(self) -> Self:
        folder = Path(tempfile.mkdtemp(prefix="trimtab-machines-"))
        # The switch is the last to end, and removes the folder also where the owner can not.
        self._switch = Holder(["--net"], setup="ip link set lo up", on_end=f"rm -rf -- '{folder}'")
        try:
            self.network = Network(self._switch)
            names = [f"machine{index}" for index in range(self._num_machines)]
            lines = [f"{address_of(index)} {name}" for index, name in enumerate(names)]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
            for index in range(self._num_machines):
                self._machines.append(Machine(index, folder, self.network, names, self._disk_bytes))
                self._machines[-1].boot()
        except BaseException:  # Ctrl-C included
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __len__(self) -> int:
        return len(self._machines)

    def __getitem__(self, index: int) -> Machine:  # type: ignore[override]  # no slices
        return self._machines[index]

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:  # every step is taken, whatever the others raise
            stack.callback(self._switch.close)
            if hasattr(self, "network"):
                stack.callback(self.network.close)
            for machine in self._machines:
                stack.callback(machine.close)
        self._machines.clear()
