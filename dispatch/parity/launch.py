"""Ranks for the parity command: started here on loopback, or those of a launcher such as torchrun."""

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Concatenate, ParamSpec, cast

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

P = ParamSpec("P")
RankFunction = Callable[Concatenate[dist.ProcessGroup, torch.device, P], bool]

PASSED = "passed"  # file by which spawned ranks tell that all is equal
TIMEOUT = timedelta(seconds=120)  # of one collective: a case takes well under a second


def launched_world_size() -> int | None:
    """The number of ranks under a launcher, None without one."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def launch(world_size: int, device: str, fn: RankFunction[P], *args: P.args, **kwargs: P.kwargs) -> int:
    """Call `fn(group, device, ...)` on every rank. Returns 0 when it says True and 1 when it says False or fails.

    Without a launcher the ranks are fresh processes of this machine, and `fn` and its arguments are pickled.
    """
    if launched_world_size() is not None:
        return _rank_of_launcher(device, fn, *args, **kwargs)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        try:
            spawn(_spawned_rank, (world_size, device, Path(folder), fn, args, kwargs), nprocs=world_size)
        except (ProcessRaisedException, ProcessExitedException) as error:
            sys.stderr.write(f"rank {error.error_index} failed: {error.msg}\n")
            return 1
        return 0 if (Path(folder) / PASSED).exists() else 1


def _rank_of_launcher(device: str, fn: RankFunction[P], *args: P.args, **kwargs: P.kwargs) -> int:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    dist.init_process_group(_backend(device), timeout=TIMEOUT)
    try:
        return 0 if fn(_world(), _prepared(device, local_rank), *args, **kwargs) else 1
    finally:
        dist.destroy_process_group()


def _spawned_rank(
    rank: int,
    world_size: int,
    device: str,
    folder: Path,
    fn: RankFunction[P],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    prepared = _prepared(device, rank)
    dist.init_process_group(
        _backend(device), init_method=(folder / "store").as_uri(), rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    passed = fn(_world(), prepared, *args, **kwargs)  # type: ignore[arg-type]
    dist.destroy_process_group()
    if passed and rank == 0:
        # Not by exit codes: the first rank that leaves with one has the others killed.
        (folder / PASSED).touch()


def _world() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.group.WORLD)


def _backend(device: str) -> str:
    return "nccl" if device == "cuda" else "gloo"


def _prepared(device: str, local_rank: int) -> torch.device:
    """This rank's device, and one thread a rank; uninitialised memory becomes NaN, so that an unwritten row shows."""
    torch.set_num_threads(1)
    # Some CUDA kernels have no deterministic form and may still run: the fill is what is wanted.
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    if device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
