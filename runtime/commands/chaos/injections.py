"""The faults that are injected from outside the run.

Each function strikes, then undoes what an operator would undo, and returns the Unix time at which it struck. All have
the same arguments, so that INJECTIONS can name them by the action of their kind.
"""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime.commands.chaos.own_ray import kill_own_ray_and_driver
from runtime.commands.chaos.plan import ChaosFault
from runtime.commands.chaos.second_writer import second_writer
from runtime.commands.chaos.target import TargetRun, Unfulfilled
from workers.checkpoints.checkpoint_files import CHECKPOINTS, list_checkpoints

# Bad links, on which a step still ends well within the bound of a collective: these faults must not cost the gang.
DELAY_S, JITTER_S, LOSS = 0.01, 0.002, 0.01
BITS_PER_S = 10 * 10**6
BRIEFLY_S = 3.0  # Shorter than Ray's head waits before it declares a node dead, and than the bound of a collective.
NUM_STEPS = 4  # Steps that a run must make on a bad link.
NOTICE_S = 120.0  # For a failure to be noticed, and for a few steps.
RAYLET, GCS, AGENTS = r"\S*/raylet/raylet ", r"\S*/gcs/gcs_server ", r"ray::(DashboardAgent|RuntimeEnvAgent)"
ASIDE = "aside"  # Where the copy of a run directory lies, beside it.


def kill_worker(run: TargetRun, fault: ChaosFault) -> float:
    """Send SIGKILL to a rank."""
    os.kill(_host_pid(run, fault.rank), signal.SIGKILL)
    return time.time()


def kill_coordinator(run: TargetRun, _: ChaosFault) -> float:
    """Send SIGKILL to the coordinator. Ray starts it again."""
    return _kill(run, "ray::CoordinatorActor", range(len(run.testbed.machines)))


def kill_driver(run: TargetRun, _: ChaosFault) -> float:
    """Send SIGKILL to the command that the user has started."""
    return run.kill()


def kill_node(run: TargetRun, fault: ChaosFault) -> float:
    """Kill a machine, boot it again, and let it join the cluster."""
    run.testbed.machines[fault.machine].kill()
    struck = time.time()
    run.testbed.join(run.testbed.machines[fault.machine])
    return struck


def kill_gcs(run: TargetRun, _: ChaosFault) -> float:
    """Kill the process that keeps the state of Ray's cluster. The cluster ends with it, and is started again."""
    return _kill(run, GCS, [0])


def kill_raylet(run: TargetRun, fault: ChaosFault) -> float:
    """Kill Ray's main process on a node. The machine joins again when the run has noticed."""
    return _rejoin_when_noticed(run, fault, _kill(run, RAYLET, [fault.machine]))


def kill_agents(run: TargetRun, fault: ChaosFault) -> float:
    """Kill Ray's two helpers on a node, without which its main process ends itself. The machine then joins again."""
    return _rejoin_when_noticed(run, fault, _kill(run, AGENTS, [fault.machine], number=2))


def hang_up(run: TargetRun, _: ChaosFault) -> float:
    """Close the terminal of the driver."""
    return run.kill(signal.SIGHUP)


def remove_run_directory(run: TargetRun, _: ChaosFault) -> float:
    """Remove the run directory while the run goes on. A copy is kept, which `restore_run_directory` puts back."""
    _copy(run.run_dir, run.run_dir.with_name(ASIDE))
    struck = time.time()
    shutil.rmtree(run.run_dir)
    return struck


def restore_run_directory(run: TargetRun) -> None:
    """Put the copy back. The run must not have made a new folder in its place, which would hide the loss."""
    new = sorted(path.name for path in run.run_dir.rglob("*")) if run.run_dir.exists() else []
    shutil.rmtree(run.run_dir, ignore_errors=True)
    run.run_dir.with_name(ASIDE).rename(run.run_dir)
    if new:
        raise Unfulfilled(f"a new folder was made in the place of the run directory, with {', '.join(new)}")


def hole_in_record(run: TargetRun, _: ChaosFault) -> float:
    """Kill the driver. `runtime.commands.chaos.damage` then damages the record, so that resuming must be refused."""
    return run.kill()


def cut_link(run: TargetRun, fault: ChaosFault) -> float:
    """Cut the link of a machine until the run has noticed. By then Ray has given the node up, so it joins again."""
    run.testbed.machines.network.cut(fault.machine)
    return _rejoin_when_noticed(run, fault, time.time())


def cut_link_briefly(run: TargetRun, fault: ChaosFault) -> float:
    """Cut the link of a machine for a moment."""
    struck = time.time()
    run.testbed.machines.network.cut(fault.machine)
    try:
        time.sleep(BRIEFLY_S)
    finally:
        run.testbed.machines.network.heal(fault.machine)
    return struck


def delay_frames(run: TargetRun, fault: ChaosFault) -> float:
    """Delay all network frames of a machine."""
    struck = time.time()
    run.testbed.machines.network.delay(fault.machine, DELAY_S, JITTER_S)
    return _endure(run, struck, lambda: run.testbed.machines.network.undelay(fault.machine))


def lose_frames(run: TargetRun, fault: ChaosFault) -> float:
    """Lose some network frames of a machine."""
    struck = time.time()
    run.testbed.machines.network.delay(fault.machine, 0.0, loss=LOSS)
    return _endure(run, struck, lambda: run.testbed.machines.network.undelay(fault.machine))


def limit_link(run: TargetRun, fault: ChaosFault) -> float:
    """Limit the bandwidth of a machine."""
    struck = time.time()
    run.testbed.machines.network.limit(fault.machine, BITS_PER_S)
    return _endure(run, struck, lambda: run.testbed.machines.network.limit(fault.machine, None))


def fill_disk(run: TargetRun, _: ChaosFault) -> float:
    """Fill the disk of the runs until the run says that a checkpoint did not fit."""
    filler, struck, before = run.testbed.runs / "filler", time.time(), len(run.said())
    try:
        _fill(filler)
        run.wait(lambda: "checkpoint failed" in run.said(before), "a checkpoint that does not fit", NOTICE_S)
    finally:
        filler.unlink()
    return struck


def damage_checkpoint(run: TargetRun, fault: ChaosFault) -> float:
    """Cut off the end of the newest checkpoint, then kill a rank."""
    _truncate_newest(run)
    return kill_worker(run, fault)


def damage_checkpoint_and_kill_driver(run: TargetRun, _: ChaosFault) -> float:
    """Cut off the end of the newest checkpoint, then kill the driver. Resuming must be refused."""
    _truncate_newest(run)
    return run.kill()


INJECTIONS: dict[str, Callable[[TargetRun, ChaosFault], float]] = {
    function.__name__: function
    for function in (
        kill_worker,
        kill_coordinator,
        kill_gcs,
        kill_raylet,
        kill_agents,
        kill_own_ray_and_driver,
        hang_up,
        remove_run_directory,
        second_writer,
        hole_in_record,
        kill_driver,
        kill_node,
        cut_link,
        cut_link_briefly,
        delay_frames,
        lose_frames,
        limit_link,
        fill_disk,
        damage_checkpoint,
        damage_checkpoint_and_kill_driver,
    )
}


# What an operator does before a run is resumed.
MENDS: dict[str, Callable[[TargetRun], None]] = {
    "kill_gcs": lambda run: run.testbed.restart(),
    "remove_run_directory": restore_run_directory,
}


def _kill(run: TargetRun, pattern: str, machines: Iterable[int], number: int = 1) -> float:
    """Send SIGKILL to the processes of these machines whose command matches. Unfulfilled if not `number` match."""
    found = [
        each
        for index in machines
        for each in run.testbed.machines[index].processes()
        if re.match(pattern, each.command)
    ]
    if len(found) != number:
        raise Unfulfilled(f"there are {len(found)} processes {pattern!r} instead of {number}")
    for process in found:
        os.kill(process.host_pid, signal.SIGKILL)
    return time.time()


def _rejoin_when_noticed(run: TargetRun, fault: ChaosFault, struck: float) -> float:
    run.wait(lambda: run.events("failed", struck), "noticing that a node is gone", NOTICE_S)
    run.testbed.join(run.testbed.machines[fault.machine])
    return struck


def _copy(run_dir: Path, target: Path) -> None:
    """Copy a run directory: checkpoints first, so that the records in the copy reach beyond them."""
    for _ in range(5):
        shutil.rmtree(target, ignore_errors=True)
        try:
            shutil.copytree(run_dir / CHECKPOINTS, target / CHECKPOINTS, ignore=shutil.ignore_patterns(".step_*"))
            shutil.copytree(run_dir, target, ignore=shutil.ignore_patterns(CHECKPOINTS), dirs_exist_ok=True)
        except (shutil.Error, FileNotFoundError):  # the run has removed an old checkpoint meanwhile
            continue
        return
    raise Unfulfilled(f"{run_dir} could not be copied while the run writes")


def _host_pid(run: TargetRun, rank: int) -> int:
    """The process id of a rank on the host, by the rank map of the run's last start."""
    starts = [*run.events("started", 0.0), *run.events("resumed", 0.0)]
    row = max(starts, key=lambda event: event["time"])["rank_map"][rank]
    [machine] = [machine for machine in run.testbed.machines if machine.address == row["node"]]
    for process in machine.processes():
        if process.pid == row["pid"]:
            return process.host_pid
    raise Unfulfilled(f"rank {rank} (pid {row['pid']} of {machine.name}) is not there")


def _endure(run: TargetRun, struck: float, undo: Callable[[], None]) -> float:
    """Let the run make some steps under a fault that must not stop it, then undo the fault."""
    first = run.step
    try:
        run.wait(lambda: run.step >= first + NUM_STEPS, f"{NUM_STEPS} steps on a bad link", NOTICE_S)
    finally:
        undo()
    return struck


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # no space left: done
        while True:
            file.write(bytes(2**16))


def _truncate_newest(run: TargetRun) -> None:
    """Wait for a new checkpoint, then cut its largest file in half. The next checkpoint is some steps away then."""
    checkpoints = run.run_dir / CHECKPOINTS
    before = list_checkpoints(checkpoints)[-1:]
    run.wait(lambda: list_checkpoints(checkpoints)[-1:] != before, "a new checkpoint", NOTICE_S)
    largest = max(list_checkpoints(checkpoints)[-1].iterdir(), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
