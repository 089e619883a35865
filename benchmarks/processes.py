"""Runs the ranks of a benchmark as processes of this machine."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_processes(world_size: int, call: Callable[..., T], *args: object) -> list[T]:
    """The results of `call(*args, rank, world_size)` by rank; each rank is a fresh Python process."""
    with ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(call, *args, rank, world_size) for rank in range(world_size)]
        return [future.result() for future in futures]
