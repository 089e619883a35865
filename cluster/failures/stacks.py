"""Fetches the stack of a rank that hangs: from the rank if it answers, else by a task on its node."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.failures.kill import is_worker
from workers.distributed.mailbox import CONTROL_GROUP

if TYPE_CHECKING:
    from cluster.failures.member import Member

MAX_STACK_CHARS = 8000  # of one rank
NODE_TASK_S = 4.0  # for a task on the rank's node: its process has to start, and waits up to DUMP_S
DUMP_S = 1.0  # for the rank's signal handler (faulthandler) to write its stacks; it needs no GIL


def wait_for_stacks(members: Sequence[Member], timeout_s: float) -> list[ray.ObjectRef[str] | None]:
    """Ask all members at once for their stack. None: no answer came. The call to a dead process ends in an error."""
    if not members:
        return []
    asked: list[Any] = [member.actor.stack.options(concurrency_group=CONTROL_GROUP).remote() for member in members]
    answered = set(ray.wait(asked, num_returns=len(asked), timeout=timeout_s)[0])
    return [call if call in answered else None for call in asked]


def stacks_of(members: Sequence[Member], silent: Collection[int], timeout_s: float) -> dict[int, str]:
    """Stacks by rank; "" for a rank whose stack cannot be had. Takes at most `timeout_s` plus NODE_TASK_S.

    silent: ranks that did not answer another call just now. Only a task on their node is asked for their stacks.
    """
    stacks = dict.fromkeys((member.rank for member in members), "")
    asked = [member for member in members if member.rank not in silent]
    for member, answer in zip(asked, wait_for_stacks(asked, timeout_s), strict=True):
        with contextlib.suppress(RayError):
            stacks[member.rank] = "" if answer is None else ray.get(answer)
    calls = {_ask_node(member): member.rank for member in members if not stacks[member.rank] and member.node_id}
    if calls:
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=NODE_TASK_S)[0]:
            with contextlib.suppress(RayError):  # Its node is gone.
                stacks[calls[call]] = ray.get(call)
    return {rank: stack[:MAX_STACK_CHARS] for rank, stack in stacks.items()}


def _ask_node(member: Member) -> Any:
    same_node = NodeAffinitySchedulingStrategy(member.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_stacks_of_process).options(scheduling_strategy=same_node)
    return task.remote(member.pid, member.stack_file)


def _stacks_of_process(pid: int, stack_file: int) -> str:
    """The stacks of all threads of a process on this machine, or the reason why there are none."""
    try:
        process = psutil.Process(pid)
        state = process.status()
        if not is_worker(process):
            return ""
        if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return (
                f"process {pid} is stopped: by a signal, a debugger or with its container; kill -CONT {pid} ends that"
            )
        found = _dump(pid, Path(f"/proc/{pid}/fd/{stack_file}"))
        return found or f"process {pid} is in state {state!r} and did not take a signal within {DUMP_S:g} s"
    except (psutil.Error, OSError) as error:
        return f"process {pid} could not be looked at: {error}"


def _dump(pid: int, path: Path) -> str:
    """Have a process write its stacks to its file in memory (see workers.actor), and read them."""
    with path.open("rb") as file:
        before = file.seek(0, os.SEEK_END)
        os.kill(pid, signal.SIGUSR1)
        deadline, size = time.monotonic() + DUMP_S, before
        while time.monotonic() < deadline:
            time.sleep(0.05)
            grown = os.fstat(file.fileno()).st_size
            if grown == size > before:  # unchanged for 0.05 s: all threads have been written
                break
            size = grown
        return file.read(MAX_STACK_CHARS).decode(errors="replace")
