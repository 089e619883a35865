"""The Ray actor of one rank: a thin shell around a plain worker object.

Nothing here imports Ray or torch at import time. The actor's process sets its environment first, then unpickles what
makes the worker, and only that imports torch: thread counts and transport settings are read when torch is imported.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from workers.distributed.collateral import is_collateral
from workers.distributed.mailbox import Mailbox

T = TypeVar("T")

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


# What steers the transport of a rank: forwarded from the driver, and recorded as it is in effect.
TRANSPORT_PREFIXES = ("NCCL_", "TORCH_", "GLOO_")


class JoinsGang(Protocol):
    """The one method that the actor itself calls on a worker; `call` and `control` reach the others by name."""

    def join(self, *, rank: int, world_size: int, store: Store, timeout_s: float, nodes: tuple[int, ...]) -> object:
        """nodes: the index of each rank's machine, by rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class WorkerLocation:
    """Where an actor landed.

    `gpu_ids` are those that Ray assigned to it, `num_cores` what its machine lets it use, `interface` the network
    interface that its collectives listen on, `transport` the variables of NCCL, gloo and torch in effect there,
    `import_s` how long it took to import torch and to build the worker, `stack_file` the number of the file, open in
    the process, to which it writes its stacks on SIGUSR1.
    """

    node_id: str
    ip: str
    gpu_ids: tuple[int, ...]
    pid: int
    num_cores: int
    interface: str = ""
    transport: Mapping[str, str] = field(default_factory=dict)
    import_s: float = 0.0
    stack_file: int = -1


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception on its way to the driver: as text always, as `error` only if it survives pickling."""

    message: str
    trace: str
    collateral: bool
    time_s: float  # Unix time on the worker's machine.
    error: Exception | None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        trace = "".join(traceback.format_exception(error))  # With the causes: wrapped transport errors count too.
        return cls(
            message=f"{type(error).__name__}: {error}",
            trace=trace,
            collateral=is_collateral(trace),
            time_s=time.time(),
            error=error if _survives_pickling(error) else None,
        )


class WorkerActor:
    """One rank's process. Methods return a Failure instead of raising: not every exception survives Ray's pickling."""

    def __init__(self, env: dict[str, str], pickled_make_worker: bytes) -> None:
        os.environ.update(env)
        self._pickled_make_worker = pickled_make_worker
        self._worker: Any = None
        self._store: Store | None = None
        self._mailbox = Mailbox()
        self._thread_id = 0

    def start(self) -> WorkerLocation | Failure:
        """Import torch, build the worker, and return where it runs."""
        return _guarded(self._start)

    def join(
        self,
        rank: int,
        nodes: tuple[int, ...],
        actors: Sequence[Any],
        epoch: int,
        timeout_s: float,
        num_threads: int,
    ) -> Any:
        """Give the worker its rank and the store of this epoch. All ranks must call it together.

        nodes, actors: the index of each rank's machine, and its actor, by rank: as many as there are ranks.
        """
        return _guarded(self._join, rank, nodes, actors, epoch, timeout_s, num_threads)

    def mailbox(self, method: str, *args: Any) -> Any:
        """Call a method of this rank's mailbox, for another rank that joins, or to end a join that cannot succeed."""
        return methodcaller(method, *args)(self._mailbox)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker. The calls of a rank run one after the other, on one thread."""
        return _guarded(methodcaller(method, *args), self._worker)

    def control(self, method: str, *args: Any) -> Any:
        """Call a quick method of the worker while another runs, to ask for progress or for a stop."""
        return _guarded(methodcaller(method, *args), self._worker)

    def stack(self) -> str:
        """Return the stack of the running call, for a report on a gang that hangs."""
        frame = sys._current_frames().get(self._thread_id)  # noqa: SLF001
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def _start(self) -> WorkerLocation:
        import ray

        context = ray.get_runtime_context()
        ip = ray.util.get_node_ip_address()
        gpu_ids = tuple(int(i) for i in context.get_accelerator_ids().get("GPU", []))
        # Ray leaves it unset without a GPU, and with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES always: torch would
        # see GPUs that are not ours. So device 0 of this process is the first GPU that Ray gave it.
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

    def _join(
        self,
        rank: int,
        nodes: tuple[int, ...],
        actors: Sequence[Any],
        epoch: int,
        timeout_s: float,
        num_threads: int,
    ) -> object:
        import torch

        from workers.distributed.gang_store import GangStore

        torch.set_num_threads(num_threads)
        # A gang that is formed again must not read the keys of the one before.
        self._mailbox.open(epoch)
        self._store = GangStore(self._mailbox, epoch, rank, actors)  # kept: torch calls it later too
        return self._worker.join(rank=rank, world_size=len(nodes), store=self._store, timeout_s=timeout_s, nodes=nodes)


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its container where there is one (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # No such file, or "max": no quota.
        return cores


def _write_stacks_on_signal() -> int:
    """Have SIGUSR1 append the stacks of all threads to a file in memory. Returns the file's descriptor.

    The handler is C and needs no GIL: it answers also where Python no longer does.
    """
    if not hasattr(os, "memfd_create"):  # macOS: no /proc to read it through
        return -1
    number = os.memfd_create("stacks")
    faulthandler.register(signal.SIGUSR1, number, all_threads=True)
    return number


def _guarded(function: Callable[..., T], *args: Any) -> T | Failure:
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001 The process boundary.
        return Failure.of(error)


def _survives_pickling(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)  # noqa: S301
    except Exception:  # noqa: BLE001 Whatever a foreign __reduce__ may raise.
        return False


def _name_interface(ip: str) -> None:
    """Tell gloo and NCCL the interface of this node. By itself gloo resolves the host name, often to 127.0.0.1."""
    for _, name in socket.if_nameindex():
        if _address_of(name) == ip:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _address_of(interface: str) -> str | None:
    import fcntl

    siocgifaddr = 0x8915  # Linux, IPv4.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe.fileno(), siocgifaddr, interface.encode()[:15].ljust(256, b"\0"))
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])
