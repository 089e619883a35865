"""The Ray actor of one rank: a thin shell around a plain worker object.

This module imports neither Ray nor torch when it is imported: torch reads thread counts and transport settings from the
environment at its import. The actor's process sets its environment first, then unpickles the function that makes the
worker, and only that imports torch.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import psutil

from workers.distributed.collateral import is_collateral
from workers.distributed.mailbox import Mailbox

P = ParamSpec("P")
T = TypeVar("T")

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


# Environment variables that set up a rank's transport: forwarded from the driver, and recorded as they are in effect.
TRANSPORT_PREFIXES = ("NCCL_", "TORCH_", "GLOO_")


class JoinsGang(Protocol):
    """The one method that the actor itself calls on a worker; `call` and `control` reach the others by name."""

    def join(self, *, rank: int, world_size: int, store: Store, timeout_s: float, nodes: tuple[int, ...]) -> object:
        """Join a gang as `rank`. nodes: the index of each rank's machine, by rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class WorkerLocation:
    """Where Ray has placed an actor.

    gpu_ids: those that Ray assigned to it, indices or UUIDs. num_cores: from `usable_cores`. interface: the network
    interface that its collectives listen on. transport: the environment variables of NCCL, gloo and torch in effect
    there. import_s: seconds to import torch and to build the worker. stack_file: descriptor, in that process, of the
    file to which it writes its stacks on SIGUSR1; -1 where there is none.
    """

    node_id: str
    ip: str
    gpu_ids: tuple[int | str, ...]
    pid: int
    num_cores: int
    interface: str = ""
    transport: Mapping[str, str] = field(default_factory=dict)
    import_s: float = 0.0
    stack_file: int = -1


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception on its way to the driver: as text, and as `error` if it survives pickling.

    collateral: true where it is only the consequence of another rank's end (`is_collateral`).
    """

    message: str
    trace: str
    collateral: bool
    time_s: float  # Unix time on the worker's machine.
    error: Exception | None

    @classmethod
    def from_error(cls, error: Exception) -> Failure:
        trace = "".join(traceback.format_exception(error))  # With the causes: wrapped transport errors count too.
        return cls(
            message=f"{type(error).__name__}: {error}",
            trace=trace,
            collateral=is_collateral(trace),
            time_s=time.time(),
            error=error if _survives_pickling(error) else None,
        )


def _guarded(method: Callable[P, T]) -> Callable[P, T | Failure]:
    """Return an exception of the method as a Failure: not every exception survives Ray's pickling."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T | Failure:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 The process boundary.
            return Failure.from_error(error)

    return call


class WorkerActor:
    """One rank's process."""

    def __init__(self, env: dict[str, str], pickled_make_worker: bytes) -> None:
        os.environ.update(env)
        self._pickled_make_worker = pickled_make_worker
        self._worker: Any = None
        self._store: Store | None = None
        self._mailbox = Mailbox()
        self._thread_id = 0

    @_guarded
    def start(self) -> WorkerLocation:
        """Import torch, build the worker, and return where it runs."""
        import ray

        context = ray.get_runtime_context()
        ip = ray.util.get_node_ip_address()
        gpu_ids = parse_gpu_ids(context.get_accelerator_ids().get("GPU", []))
        # Ray leaves CUDA_VISIBLE_DEVICES as it is for an actor without a GPU, and for all actors if
        # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set: torch would then see the GPUs of other actors. Set here,
        # device 0 of this process is the first GPU that Ray gave it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpu_ids))
        _name_interface(ip)  # Before torch is imported.
        begun = time.monotonic()
        make_worker: Callable[[], JoinsGang] = pickle.loads(self._pickled_make_worker)  # noqa: S301
        self._worker = make_worker()
        self._thread_id = threading.get_ident()
        return WorkerLocation(
            node_id=context.get_node_id(),
            ip=ip,
            gpu_ids=gpu_ids,
            pid=os.getpid(),
            num_cores=usable_cores(),
            interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
            transport={name: os.environ[name] for name in sorted(os.environ) if name.startswith(TRANSPORT_PREFIXES)},
            import_s=time.monotonic() - begun,
            stack_file=_write_stacks_on_signal(),
        )

    @_guarded
    def join(
        self,
        rank: int,
        nodes: tuple[int, ...],
        actors: Sequence[Any],
        epoch: int,
        timeout_s: float,
        num_threads: int,
    ) -> object:
        """Give the worker its rank and the store of this epoch. All ranks must call it together.

        nodes, actors: the index of each rank's machine, and its actor, by rank: as many as there are ranks.
        """
        import torch

        from workers.distributed.gang_store import GangStore

        torch.set_num_threads(num_threads)
        self._mailbox.open(epoch)  # a gang that forms again must not read keys of the gang before
        self._store = GangStore(self._mailbox, epoch, rank, actors)  # a reference to keep it: torch calls it later too
        return self._worker.join(rank=rank, world_size=len(nodes), store=self._store, timeout_s=timeout_s, nodes=nodes)

    def mailbox(self, method: str, *args: Any) -> Any:
        """Call a method of this rank's mailbox: for another rank that joins, or for the driver to end a failed join."""
        return methodcaller(method, *args)(self._mailbox)

    @_guarded
    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker. The calls of a rank run one after the other, on one thread."""
        return methodcaller(method, *args)(self._worker)

    @_guarded
    def control(self, method: str, *args: Any) -> Any:
        """Call a quick method of the worker while another runs, to ask for progress or for a stop."""
        return methodcaller(method, *args)(self._worker)

    def stack(self) -> str:
        """Return the stack of the running call, for a report on a gang that hangs."""
        frame = sys._current_frames().get(self._thread_id)  # noqa: SLF001
        return "".join(traceback.format_stack(frame)) if frame is not None else ""


def parse_gpu_ids(texts: Sequence[str]) -> tuple[int | str, ...]:
    """The ids that Ray gives an actor, in order. Where CUDA_VISIBLE_DEVICES names UUIDs (also of MIG), so does Ray."""
    in_order = sorted(map(str, texts), key=gpu_order)  # Ray keeps them in a set
    return tuple(int(text) if text.isdecimal() else text for text in in_order)


def gpu_order(gpu_id: int | str) -> tuple[int, str]:
    """A key to sort GPU ids by: indices as numbers, 2 before 10, and UUIDs as text."""
    text = str(gpu_id)
    return len(text), text


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its container where there is one (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # No such file, or "max": no quota.
        return cores


def _write_stacks_on_signal() -> int:
    """Have SIGUSR1 append the stacks of all threads to a file in memory. Returns the file's descriptor, or -1.

    The handler is C code and needs no GIL: it works also while another thread holds the GIL forever.
    """
    if not hasattr(os, "memfd_create"):  # macOS, which has no /proc either to read the file through
        return -1
    descriptor = os.memfd_create("stacks")
    faulthandler.register(signal.SIGUSR1, descriptor, all_threads=True)
    return descriptor


def _survives_pickling(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)  # noqa: S301
    except Exception:  # noqa: BLE001 Whatever a foreign __reduce__ may raise.
        return False


def _name_interface(ip: str) -> None:
    """Tell gloo and NCCL the interface of this address. By default gloo resolves the host name, often to 127.0.0.1."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == ip for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
