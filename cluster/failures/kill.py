"""End the process of an actor that does not answer, from its own node."""

from __future__ import annotations

import contextlib

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.actor import WorkerActor, WorkerLocation


def kill_process(place: WorkerLocation) -> None:
    """Send SIGKILL to a worker's process. Does not wait; where its node is gone, nothing happens.

    `ray.kill` asks the process to end and kills it where no answer comes. On one of three machines the question to a
    stopped process failed instead, the process kept its place, and the replacement waited for it in vain (Ray 2.60).
    """
    here = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=here).remote(place.pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        if is_worker(process := psutil.Process(pid)):
            process.kill()


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is one of our workers, by the name that Ray gave it: its pid may have been reused."""
    return "".join(process.cmdline()[:1]).startswith(f"ray::{WorkerActor.__name__}")
