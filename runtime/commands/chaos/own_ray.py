"""Kills the Ray that a driver started itself, then the driver, and checks that the run can be resumed."""

import os
import re
import signal
import time

from runtime.commands.chaos.leftovers import left_on_machine, temporary_files
from runtime.commands.chaos.plan import ChaosFault
from runtime.commands.chaos.record import read_record
from runtime.commands.chaos.sameness import differences
from runtime.commands.chaos.second_writer import refuse
from runtime.commands.chaos.target import TargetRun, Unfulfilled
from runtime.terminal.interrupt import exit_code_of

STEPS = 6  # Made between two faults: one checkpoint, and some after it.
START_S, END_S = 240.0, 120.0
PROMISE = r"go on with: trimtab train --resume \S*own.*Ray's gcs_server \(pid \d+\) on this machine has died"


def kill_own_ray_and_driver(run: TargetRun, fault: ChaosFault) -> float:
    """Kill the driver of `run`; while it is down, test a second run whose driver starts Ray itself.

    Of the second run, kill Ray's gcs_server and resume, kill the driver and resume, then stop it by SIGTERM.

    Raises:
        Unfulfilled: the second run did not end with the promised words, lost steps, or left something behind.
    """
    at = run.kill()
    run.wait_for_end("the end of the driver", END_S)
    head = run.testbed.machines[0]
    before = {each.host_pid for each in head.processes()}, temporary_files(run.testbed, head), head.shared_memory()
    own = run.sibling(f"own{fault.number}")
    try:
        own.start_with_own_ray()
        own.wait(own.run_dir.exists, "its start", START_S)
        refuse(own, lambda: [own.second_start(0)])
        _train(own)
        _lose_ray(own)
        _train_on(own)
        own.kill()
        own.wait_for_end("the end of its driver", END_S)
        _train_on(own)
        own.kill(signal.SIGTERM)
        own.wait_for_end("saving and stopping", END_S)
    finally:
        own.stop()
    if own.exit_code != exit_code_of(signal.SIGTERM):
        raise Unfulfilled(f"asked to stop, it ended with exit code {own.exit_code}")
    _check_record(own)
    if left := left_on_machine(run.testbed, head, *before):
        raise Unfulfilled(f"a driver with a Ray of its own left {'; '.join(left)}")
    return at


def _train(own: TargetRun) -> None:
    own.wait(lambda: own.step, "training on a Ray of its own", START_S)
    first = own.step
    own.wait(lambda: own.step >= first + STEPS, "training on", START_S)


def _train_on(own: TargetRun) -> None:
    """Resume and train. Workers of the dead driver must be gone by then: they would write the same record."""
    at = time.time()
    own.resume()
    own.wait(lambda: own.events("resumed", at), "resuming on a Ray of its own", START_S)
    _train(own)
    if left := own.leftovers.still_there():
        raise Unfulfilled(f"a dead driver with a Ray of its own left {'; '.join(left)}")


def _lose_ray(own: TargetRun) -> None:
    before, at = len(own.said()), time.time()
    mark = f"{own.testbed.disk(own.testbed.machines[0])}/trimtab-ray-"
    [gcs] = [
        each
        for each in own.testbed.machines[0].processes()
        if "/gcs/gcs_server " in each.command and mark in each.command
    ]
    os.kill(gcs.host_pid, signal.SIGKILL)
    own.wait_for_end("ending after its own Ray", END_S)
    if own.exit_code != 1 or not own.events("failed", at):
        raise Unfulfilled(f"without its own Ray it ended with exit code {own.exit_code}, and no event `failed`")
    if not re.search(PROMISE, said := " ".join(own.said(before).split())):
        raise Unfulfilled(f"without its own Ray it does not say how to go on: {said[-300:]}")


def _check_record(own: TargetRun) -> None:
    record = read_record(own.run_dir)
    steps = [line["step"] for line in record.lines if line["kind"] == "train"]
    if record.damage or steps != list(range(1, len(steps) + 1)):
        raise Unfulfilled(f"the record of the run on its own Ray lacks steps or has them twice: {record.damage}")
    again = [line for line in record.superseded_lines if line["kind"] == "train" and line["step"] <= len(steps)]
    if found := differences(again, [line for line in record.lines if line["kind"] == "train"]):
        raise Unfulfilled(f"the run on its own Ray made another step {min(found)}: {found[min(found)]}")
