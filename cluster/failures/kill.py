"""Ends the process of an actor that does not answer, from its own node. What a killed worker triggers: see `calls`."""

from __future__ import annotations

import contextlib

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.actor import WorkerActor, WorkerLocation


def kill_process(place: WorkerLocation) -> None:
    """Send SIGKILL to a worker's process, by a task on its node. Does not wait; if the node is gone, nothing happens.

    `ray.kill` is not enough (Ray 2.60): it asks the process to end, and should kill it if no answer comes. In a run on
    three machines, that request to a stopped process failed instead. The process kept its resources, and the
    replacement waited for them in vain.
    """
    same_node = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=same_node).remote(place.pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        if is_worker(process := psutil.Process(pid)):
            process.kill()


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is one of our workers, by the name that Ray gave it: its pid may have been reused."""
    return "".join(process.cmdline()[:1]).startswith(f"ray::{WorkerActor.__name__}")
