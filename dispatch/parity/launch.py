"""Runs a function on several ranks: processes that it starts on this machine, or those of a launcher like torchrun."""

import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Concatenate, NoReturn, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, ProcessRaisedException, spawn

P = ParamSpec("P")
T = TypeVar("T")
RankFunction = Callable[Concatenate[dist.ProcessGroup, torch.device, P], T]

RESULT = "result"  # file with the pickled result of a rank 0 that was started here


class RankFailed(Exception):
    """A rank that was started here failed; the message has its number and its traceback."""


def launched_world_size() -> int | None:
    """The number of ranks under a launcher, None without one."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def launched_ranks_per_node() -> int | None:
    """The ranks of this node under a launcher that sets LOCAL_WORLD_SIZE, None otherwise."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None


def launch(
    world_size: int, device: str, timeout: timedelta, fn: RankFunction[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call `fn(group, device, ...)` on every rank; returns what rank 0 returned, under a launcher what this rank did.

    Without a launcher the ranks are fresh processes of this machine, and `fn`, its arguments and its result are
    pickled. None of them outlives this call, however it ends. timeout: of one collective.

    Raises:
        RankFailed: a rank started here failed; the others were ended.
    """
    if launched_world_size() is not None:
        return _rank_of_launcher(device, timeout, fn, *args, **kwargs)
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        _run_gang(world_size, device, timeout, Path(folder), fn, args, kwargs)
        result: T = pickle.loads((Path(folder) / RESULT).read_bytes())  # noqa: S301 - our own rank has just written it
        return result


def _rank_of_launcher(device: str, timeout: timedelta, fn: RankFunction[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    rank_device = _rank_device(device, local_rank)
    dist.init_process_group(_backend(device), timeout=timeout)
    try:
        return fn(_world(), rank_device, *args, **kwargs)
    finally:
        dist.destroy_process_group()


def _run_gang(world_size: int, *args: object) -> None:
    gang = _start_gang(world_size, *args)
    try:
        while not gang.join():
            pass
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise RankFailed(f"rank {error.error_index} failed: {error.msg}") from error
    finally:
        for process in gang.processes:
            process.kill()
            process.join()


def _start_gang(world_size: int, *args: object) -> ProcessContext:
    # A Ctrl-C in a terminal is sent to the ranks too. SIGINT is blocked here, and the ranks inherit that until they
    # have set their handlers, so that they end without a traceback. This process is interrupted only when it knows all
    # ranks and can end them; as daemons they end even if the interrupt comes before `_run_gang` waits for them.
    resource_tracker.ensure_running()  # else multiprocessing would start it below, and unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return cast(
            ProcessContext, spawn(_spawned_rank, (world_size, *args), nprocs=world_size, join=False, daemon=True)
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _spawned_rank(
    rank: int,
    world_size: int,
    device: str,
    timeout: timedelta,
    folder: Path,
    fn: RankFunction[P, T],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    rank_device = _rank_device(device, rank)
    dist.init_process_group(
        _backend(device), init_method=(folder / "store").as_uri(), rank=rank, world_size=world_size, timeout=timeout
    )
    result = fn(_world(), rank_device, *args, **kwargs)  # type: ignore[arg-type]
    dist.destroy_process_group()
    if rank == 0:
        # By a file, not by an exit code: torch's spawn kills the other ranks when one ends with a code that is not 0.
        (folder / RESULT).write_bytes(pickle.dumps(result))
    _leave()


def _leave() -> NoReturn:
    """End this process without finalizing the Python interpreter.

    A thread of gloo may still be freeing the tensors of its last collective, for which it needs the GIL. An interpreter
    that is finalizing answers such a thread with pthread_exit. In a C++ destructor that calls std::terminate, and the
    process would end by SIGABRT after all work was done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _world() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.group.WORLD)


def _backend(device: str) -> str:
    return "nccl" if device == "cuda" else "gloo"


def _rank_device(device: str, local_rank: int) -> torch.device:
    """The device of a rank; a CUDA device also becomes the current one."""
    if device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
