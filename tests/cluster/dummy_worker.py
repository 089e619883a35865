"""A worker without a model, for tests of the gang. Ray's workers import this module by its name."""

import ctypes
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from dispatch.diagnosis.activity import Activity
from dispatch.diagnosis.activity_tracker import ActivityTracker

MARK_AT_IMPORT = os.environ.get("TRIMTAB_TEST_MARK")


class DummyWorker:
    """All-reduces ones; a plan says which rank does what at which step."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.steps = 0

    def join(self, *, rank: int, world_size: int, store: Store, timeout_s: float, nodes: tuple[int, ...]) -> None:
        self.rank = rank
        self.nodes = nodes
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        self.thread = threading.get_ident()

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def facts(self) -> dict:
        return {
            "rank": self.rank,
            "nodes": self.nodes,
            "pid": os.getpid(),
            "num_threads": torch.get_num_threads(),
            "mark_at_import": MARK_AT_IMPORT,
            "one_thread": threading.get_ident() == self.thread,
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
            "cuda_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }

    def train(self, num_steps: int, plan: dict[tuple[int, int], str]) -> float:
        """Sum 1 over the ranks, once a step. `plan`: (rank, step) to the name of what happens then."""
        total = torch.zeros(1)
        for self.steps in range(num_steps):
            event = plan.get((self.rank, self.steps))
            if event is not None:
                getattr(self, event)()
            value = torch.ones(1)
            dist.all_reduce(value)
            total += value
        return total.item()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def freeze(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def complain(self) -> None:
        raise ValueError("a bad batch")

    def wait(self) -> None:
        assert self.released.wait(60)

    def hold_the_gil(self) -> None:
        ctypes.PyDLL(None).sleep(120)  # no other thread of this process runs Python meanwhile

    def release(self) -> str:
        self.released.set()
        return f"released rank {self.rank}"

    def refuse(self) -> None:
        raise KeyError("no such thing")

    def save_when_released(self, path: str) -> str:
        """Work until released, then write a file: what a run does that saves a checkpoint after Ctrl-C."""
        self.wait()
        dist.barrier()
        Path(path, f"rank{self.rank}").write_text("saved")
        return "saved"


class StuckWorker(DummyWorker):
    """Never gets ready on the first bundle that asks."""

    def __init__(self) -> None:
        super().__init__()
        threading.Event().wait(60)


class BrokenWorker(DummyWorker):
    def __init__(self) -> None:
        raise RuntimeError("cannot be built")


class WaitingWorker(DummyWorker):
    """Says what it is in, as a real worker does."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = ActivityTracker()

    def meet(self, sleep_s: float) -> int:
        """Sum 1 over the ranks; rank 1 comes later."""
        if self.rank == 1:
            time.sleep(sleep_s)
        value = torch.ones(1)
        self.tracker.run(dist.all_reduce, value, group=dist.group.WORLD)
        return int(value)

    def activity(self) -> dict[str, Activity]:
        return {"training": self.tracker.read()}
