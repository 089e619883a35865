"""Run one function as several gloo ranks on this machine: the only multi-process launcher of the suite.

Processes are forked from a server that has torch imported already, so that a gang starts in a fraction of a second. The
server keeps the environment it was started with: pass values as arguments, not through os.environ.
"""

import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# What most rank functions need: imported once by the server instead of once by every process. Of ours it is all that a
# rank trains with, which takes 0.1 s.
PRELOADED = ["torch.distributed.checkpoint", "torch.utils.checkpoint", "torch._dynamo", "numpy", "pytest", "hypothesis"]
PRELOADED += ["tests.workers.training_gang", "dispatch.parity.command"]
START_LIMIT_S = 90.0  # the first gang also waits for the server's `import torch`, 3 to 14 s on 2 busy cores
GRACE_S = 0.5  # after a first failure: time for the others to report theirs


class RankFailure(Exception):
    """A rank failed or the time limit passed.

    Attributes:
        rank: the rank that failed first; None when the time limit passed and nobody had failed.
        still_running: ranks that had neither returned nor failed when the rest was killed.
    """

    def __init__(self, message: str, rank: int | None, still_running: list[int]) -> None:
        super().__init__(message, rank, still_running)  # all of them in args, so that it survives pickling
        self.rank = rank
        self.still_running = still_running

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class _Rank:
    """What the parent knows about one rank."""

    rank: int
    process: ForkServerProcess
    pipe: Connection
    stack_file: Path
    state: str = "starting"  # -> "started" -> "returned" or "failed" or "died"
    result: bytes = b""
    error: str = ""
    ended_at: float = field(default=float("inf"))

    @property
    def running(self) -> bool:
        return self.state in ("starting", "started")

    def read(self) -> None:
        """Take the news that `wait` announced: a message, or the end of the process."""
        try:
            kind, moment, payload = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(GRACE_S)
            self.state, self.ended_at = "died", time.monotonic()
            self.error = f"died without a report, exit code {self.process.exitcode}\n"
            return
        self.state = kind
        if kind == "returned":
            self.result = payload
        elif kind == "failed":
            self.error, self.ended_at = payload, moment


def run_ranks(world_size: int, fn: Callable[..., T], *args: Any, timeout_s: float = 300.0) -> list[T]:
    """Call `fn(rank, world_size, *args)` in `world_size` processes and return the results by rank.

    The default process group (gloo on loopback, one thread a rank) is ready when `fn` starts. `fn` is a module-level
    function; arguments and results are pickled by value. The clock starts when all processes have started; collectives
    of the default group give up a quarter before it ends, so that a hang shows as the error of a collective.

    Raises:
        RankFailure: with the traceback of the rank that failed first, and the Python stacks of those that still run.
    """
    context = _fork_context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = pickle.dumps((fn, args))
        ranks = [_start(context, rank, world_size, job, Path(folder), timeout_s) for rank in range(world_size)]
        try:
            _watch(ranks, until=lambda: all(r.state != "starting" for r in ranks), limit_s=START_LIMIT_S)
            for r in ranks:
                r.pipe.send("go")
            _watch(ranks, until=lambda: not any(r.running for r in ranks), limit_s=timeout_s)
        finally:
            _kill_leftovers(ranks)
    return [pickle.loads(r.result) for r in ranks]


def start_process(fn: Callable[..., object], *args: Any) -> ForkServerProcess:
    """One more process, forked like a rank, that may die as it likes. It is killed if this one ends before it."""
    process = _fork_context().Process(target=_process_main, args=(fn, args), daemon=True)
    process.start()
    return process


def _process_main(fn: Callable[..., object], args: tuple[Any, ...]) -> None:
    import torch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    fn(*args)


@functools.cache
def _fork_context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _start(context: ForkServerContext, rank: int, world_size: int, job: bytes, folder: Path, timeout_s: float) -> _Rank:
    ours, theirs = context.Pipe()
    stack_file = folder / f"stack-{rank}"
    arguments = (rank, world_size, job, theirs, str(folder / "store"), str(stack_file), 0.75 * timeout_s)
    process = context.Process(target=_rank_main, args=arguments, name=f"rank-{rank}", daemon=True)
    process.start()
    theirs.close()  # else the end of the process would not show as the end of the pipe
    return _Rank(rank, process, ours, stack_file)


def _watch(ranks: list[_Rank], until: Callable[[], bool], limit_s: float) -> None:
    """Read the ranks' news until `until()`; raise on the first failure or when `limit_s` has passed."""
    deadline = time.monotonic() + limit_s
    while not until():
        _read_news(ranks, deadline - time.monotonic())
        if any(r.state in ("failed", "died") for r in ranks):
            grace_ends = time.monotonic() + GRACE_S
            while time.monotonic() < grace_ends and any(r.running for r in ranks):
                _read_news(ranks, grace_ends - time.monotonic())
            raise _failure(ranks, limit_s)
        if time.monotonic() > deadline and not until():
            raise _failure(ranks, limit_s)


def _read_news(ranks: list[_Rank], wait_s: float) -> None:
    by_pipe = {r.pipe: r for r in ranks if r.running}
    for pipe in wait(list(by_pipe), max(wait_s, 0.0)):
        by_pipe[pipe].read()  # type: ignore[index]


def _failure(ranks: list[_Rank], limit_s: float) -> RankFailure:
    still_running = [r.rank for r in ranks if r.running]
    # A process that died told nobody when; its peers notice its closed connections later, so it goes before them.
    bad = sorted((r for r in ranks if r.error), key=lambda r: (r.state != "died", r.ended_at))
    lines = [f"rank {bad[0].rank} failed first:\n{bad[0].error}"] if bad else [f"time limit of {limit_s:g} s passed."]
    lines += [f"rank {r.rank} {r.state} after it: {r.error.strip().splitlines()[-1]}" for r in bad[1:]]
    lines += [f"rank {r.rank} returned" for r in ranks if r.state == "returned"]
    lines += [f"rank {r.rank} still runs:\n{_stack_of(r)}" for r in ranks if r.running]
    return RankFailure("\n".join(lines), bad[0].rank if bad else None, still_running)


def _stack_of(r: _Rank) -> str:
    """Python stacks of a live rank. faulthandler answers even while the process waits inside a collective."""
    if r.state == "starting" or r.process.pid is None:
        return "(not started yet)"
    os.kill(r.process.pid, signal.SIGUSR1)
    give_up = time.monotonic() + GRACE_S
    while not (text := r.stack_file.read_text()).endswith("\n") and time.monotonic() < give_up:
        time.sleep(0.01)
    return text


def _kill_leftovers(ranks: list[_Rank]) -> None:
    for r in ranks:
        if r.running:
            r.process.kill()
    for r in ranks:
        r.process.join(5.0)
        if r.process.is_alive():  # returned, but its exit hangs: a defect of the function, yet no leftover of ours
            r.process.kill()
            r.process.join()
        r.process.close()
        r.pipe.close()


def _rank_main(
    rank: int, world_size: int, job: bytes, pipe: Connection, store: str, stack_file: str, collective_timeout_s: float
) -> None:
    """The whole life of a rank's process."""
    gc.freeze()  # what the server has imported stays: to look at all of it takes half a second a collection
    import torch
    import torch.distributed as dist

    with Path(stack_file).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        try:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.set_num_threads(1)
            fn, args = pickle.loads(job)
            pipe.send(("started", time.monotonic(), None))
            pipe.recv()  # "go": all have started, so that nobody's rendezvous waits for a slow import
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=collective_timeout_s),
            )
            dist.barrier()  # else a rank that returns at once closes connections that another one is still making
            result = pickle.dumps(fn(rank, world_size, *args))
            if dist.is_initialized():  # a worker may have left it
                dist.destroy_process_group()
            pipe.send(("returned", time.monotonic(), result))
        except BaseException:  # noqa: BLE001 - the process boundary: whatever ended the function is the parent's to report
            pipe.send(("failed", time.monotonic(), traceback.format_exc()))
        finally:
            faulthandler.unregister(signal.SIGUSR1)
