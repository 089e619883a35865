"""The faults that are done from outside. Each strikes, undoes what an operator would undo, and returns when it struck.

All take the run and the fault, whether they need both or not.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from runtime.chaos.plan import ChaosFault
from runtime.chaos.target import TargetRun, Unfulfilled
from workers.checkpoint import list_checkpoints
from workers.training_run import CHECKPOINTS

DELAY_S, JITTER_S, LOSS = 0.01, 0.002, 0.01
BITS_PER_S = 10 * 10**6
BRIEFLY_S = 3.0  # Less than what it takes the head to declare a node dead, and than the bound of a collective.
STEPS_UNDER = 4  # Steps that a run is to make on a bad link.
NOTICE_S = 120.0  # For a failure to be noticed, and for a few steps.


def kill_worker(run: TargetRun, fault: ChaosFault) -> float:
    """Send SIGKILL to a rank."""
    os.kill(_host_pid(run, fault.rank), signal.SIGKILL)
    return time.time()


def kill_coordinator(run: TargetRun, _: ChaosFault) -> float:
    """Send SIGKILL to the coordinator. Ray starts it again."""
    pids = [
        each.host_pid
        for machine in run.testbed.machines
        for each in machine.processes()
        if each.command.startswith("ray::CoordinatorActor")
    ]
    if len(pids) != 1:
        raise Unfulfilled(f"there are {len(pids)} coordinators instead of one")
    os.kill(pids[0], signal.SIGKILL)
    return time.time()


def kill_driver(run: TargetRun, _: ChaosFault) -> float:
    """Send SIGKILL to the command that the user has started."""
    return run.kill()


def kill_node(run: TargetRun, fault: ChaosFault) -> float:
    """The end of a machine; it is booted again and joins the cluster anew."""
    run.testbed.machines[fault.machine].kill()
    at = time.time()
    run.testbed.join(run.testbed.machines[fault.machine])
    return at


def cut_link(run: TargetRun, fault: ChaosFault) -> float:
    """A machine falls silent until the run has noticed. Ray has given the node up by then: it joins anew."""
    run.testbed.machines.network.cut(fault.machine)
    at = time.time()
    run.wait(lambda: run.events("failed", at), "noticing that a link is cut", NOTICE_S)
    run.testbed.join(run.testbed.machines[fault.machine])
    return at


def cut_link_briefly(run: TargetRun, fault: ChaosFault) -> float:
    """A machine falls silent for a moment."""
    at = time.time()
    run.testbed.machines.network.cut(fault.machine)
    try:
        time.sleep(BRIEFLY_S)
    finally:
        run.testbed.machines.network.heal(fault.machine)
    return at


def delay_frames(run: TargetRun, fault: ChaosFault) -> float:
    """All frames of a machine come late."""
    at = time.time()
    run.testbed.machines.network.delay(fault.machine, DELAY_S, JITTER_S)
    return _endure(run, at, lambda: run.testbed.machines.network.undelay(fault.machine))


def lose_frames(run: TargetRun, fault: ChaosFault) -> float:
    """Some frames of a machine never come."""
    at = time.time()
    run.testbed.machines.network.delay(fault.machine, 0.0, loss=LOSS)
    return _endure(run, at, lambda: run.testbed.machines.network.undelay(fault.machine))


def limit_link(run: TargetRun, fault: ChaosFault) -> float:
    """A machine has a slow link."""
    at = time.time()
    run.testbed.machines.network.limit(fault.machine, BITS_PER_S)
    return _endure(run, at, lambda: run.testbed.machines.network.limit(fault.machine, None))


def fill_disk(run: TargetRun, _: ChaosFault) -> float:
    """The disk of the runs is full until a checkpoint did not fit."""
    filler, at, before = run.testbed.runs / "filler", time.time(), len(run.said())
    try:
        _fill(filler)
        run.wait(lambda: "checkpoint failed" in run.said(before), "a checkpoint that does not fit", NOTICE_S)
    finally:
        filler.unlink()
    return at


def damage_checkpoint(run: TargetRun, fault: ChaosFault) -> float:
    """The newest checkpoint loses its end, and then a rank dies."""
    _truncate_newest(run)
    return kill_worker(run, fault)


def damage_checkpoint_and_kill_driver(run: TargetRun, _: ChaosFault) -> float:
    """The newest checkpoint loses its end, and then the driver dies. Resuming is to be refused."""
    _truncate_newest(run)
    return run.kill()


INJECTIONS: dict[str, Callable[[TargetRun, ChaosFault], float]] = {
    function.__name__: function
    for function in (
        kill_worker,
        kill_coordinator,
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


def _host_pid(run: TargetRun, rank: int) -> int:
    """The number on the host of the process of a rank, as the run's last rank map says."""
    starts = [*run.events("started", 0.0), *run.events("resumed", 0.0)]
    row = max(starts, key=lambda event: event["time"])["rank_map"][rank]
    [machine] = [machine for machine in run.testbed.machines if machine.address == row["node"]]
    for process in machine.processes():
        if process.pid == row["pid"]:
            return process.host_pid
    raise Unfulfilled(f"rank {rank} (pid {row['pid']} of {machine.name}) is not there")


def _endure(run: TargetRun, at: float, undo: Callable[[], None]) -> float:
    first = run.step
    try:
        run.wait(lambda: run.step >= first + STEPS_UNDER, f"{STEPS_UNDER} steps on a bad link", NOTICE_S)
    finally:
        undo()
    return at


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # the end of it is what is wanted
        while True:
            file.write(bytes(2**16))


def _truncate_newest(run: TargetRun) -> None:
    """Cut the largest file of the newest checkpoint in half, as soon as there is a new one: the next is far then."""
    checkpoints = run.run_dir / CHECKPOINTS
    before = list_checkpoints(checkpoints)[-1:]
    run.wait(lambda: list_checkpoints(checkpoints)[-1:] != before, "a new checkpoint", NOTICE_S)
    largest = max(list_checkpoints(checkpoints)[-1].iterdir(), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
