"""Finds processes, memory and files that a run has left on its machines after its driver ended."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from runtime.commands.chaos.machines import Machine, MachineProcess
from runtime.commands.chaos.testbed import Testbed
from workers.checkpoints.checkpoint_files import CHECKPOINTS

LEAVE_S = 20.0  # For processes to end, and for the next checkpoint to remove what is left of the one before.
POLL_S = 0.1
# Command lines of the cluster, which outlives a run. An empty one is of a process that has ended, and whose parent has
# not asked for its exit code yet.
_CLUSTER_COMMANDS = re.compile(
    r"$|ray::(IDLE|DashboardAgent|RuntimeEnvAgent)|ray-dashboard-"
    r"|\S*/ray/|\S+ .*(-m ray\.|/ray/|from multiprocessing\.)"
)
# Temporary files that may stay: torch's cache of compiled code, and sockets of a Ray dashboard that was killed.
_OTHERS_FILES = re.compile("torchinductor_|pymp-")


class Leftovers:
    """Looks for what dead drivers have left. Call `note` before a run is resumed, then `still_there`."""

    def __init__(self, testbed: Testbed, run_dir: Path) -> None:
        self._testbed, self._run_dir = testbed, run_dir
        self._processes: set[int] = set()
        self._partial: set[Path] = set()

    def note(self) -> None:
        """Remember processes and partial checkpoints while no driver runs: the resumed run must end and remove them."""
        self._processes = set(run_processes(self._testbed))
        self._partial = set(partial_checkpoints(self._run_dir))

    def still_there(self) -> list[str]:
        """What was noted and is still there while the resumed run goes on. Waits for it to go, at most LEAVE_S."""
        return _wait_until_gone(self._noted)

    def after_the_end(self) -> list[str]:
        """What is left of the run after its driver ended well. Waits for it to go, at most LEAVE_S."""
        return _wait_until_gone(
            lambda: [*run_processes(self._testbed).values(), *map(str, partial_checkpoints(self._run_dir))]
        )

    def _noted(self) -> list[str]:
        alive = run_processes(self._testbed)
        partial = self._partial.intersection(partial_checkpoints(self._run_dir))
        return [*(alive[pid] for pid in sorted(self._processes & alive.keys())), *map(str, sorted(partial))]


def _line(machine: Machine, process: MachineProcess) -> str:
    return f"process {process.pid} of {machine.name}: {process.command[:200]}"


def run_processes(testbed: Testbed) -> dict[int, str]:
    """Describe the processes of all machines, but for those of the cluster, by their process id on the host."""
    return {
        process.host_pid: _line(machine, process)
        for machine in testbed.machines
        if machine.is_up
        for process in machine.processes()
        if not _CLUSTER_COMMANDS.match(process.command)
    }


def left_on_machine(
    testbed: Testbed, machine: Machine, pids: set[int], files: list[Path], shared_memory: list[str]
) -> list[str]:
    """What a machine has beyond these processes, temporary files and shared memory; waits LEAVE_S for it to go."""

    def look() -> list[str]:
        new = [each for each in machine.processes() if each.host_pid not in pids and each.command]
        return [
            *(_line(machine, each) for each in new),
            *(str(path) for path in temporary_files(testbed, machine) if path not in files),
            *(f"shared memory {name}" for name in machine.shared_memory() if name not in shared_memory),
        ]

    return _wait_until_gone(look)


def partial_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of checkpoints that were never complete."""
    return sorted((run_dir / CHECKPOINTS).glob(".step_*"))


def left_by_cluster(testbed: Testbed) -> list[str]:
    """What is left after the cluster was ended: processes, open ports, shared memory, files of Ray."""
    return _wait_until_gone(lambda: _left_on_machines(testbed))


def _left_on_machines(testbed: Testbed) -> list[str]:
    found = []
    for machine in testbed.machines:
        if not machine.is_up:
            continue
        found += [_line(machine, each) for each in machine.processes() if each.command]
        found += [f"port {port} of {machine.name} is open" for port in machine.listening()]
        found += [f"shared memory {name} of {machine.name}" for name in machine.shared_memory()]
        found += [str(path) for path in temporary_files(testbed, machine)]
    return found


def temporary_files(testbed: Testbed, machine: Machine) -> list[Path]:
    """Temporary files of a machine's processes, without an empty folder of node records of `trimtab cluster`."""
    found = (path for path in sorted(testbed.disk(machine).iterdir()) if not _OTHERS_FILES.match(path.name))
    return [path for path in found if not (path.name == f"tt-{os.getuid()}" and not any(path.iterdir()))]


def _wait_until_gone(look: Callable[[], list[str]]) -> list[str]:
    give_up = time.monotonic() + LEAVE_S
    while (left := look()) and time.monotonic() < give_up:
        time.sleep(POLL_S)
    return left
