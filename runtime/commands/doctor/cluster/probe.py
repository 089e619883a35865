"""The probe that examines a node from inside. Pickled by value, it works where Trimtab is missing or differs.

Therefore this file imports only the standard library at import time, and the probe answers in plain dictionaries.
"""

import contextlib
import hashlib
import hmac
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("dispatch", "workers", "cluster", "runtime")
PIECE = 2**18  # bytes of a buffer
MAX_BYTES = 2**30  # of one request
REQUEST = "<cQ"  # what to do, and with how many bytes
NUM_PINGS = 20
FILL_S = 0.1  # A transfer this long measures the rate; a shorter one the slow start of TCP.


class Probe:
    """Answers from one node. As a Ray actor it is pinned there; the driver also makes one of its own."""

    def __init__(self, token: bytes) -> None:
        """token: what another probe must show before it is served."""
        self._token = token

    def facts(self, paths: Sequence[str]) -> dict[str, Any]:
        """Versions, devices, memory and disks. paths: whose file systems are of interest; they need not exist."""
        return {
            "host": socket.gethostname(),
            "versions": _versions(),
            "sources": {package: _digest(package) for package in PACKAGES},
            "devices": _devices(),
            "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "memory_bytes": _memory(),
            "shm_bytes": _disk(Path("/dev/shm")),  # noqa: S108
            "disks": {path: _disk(Path(path).expanduser().absolute()) for path in paths},
        }

    def now_s(self) -> float:
        """This node's clock, in Unix time."""
        return time.time()

    def listen(self, ip: str) -> int:
        """Serve transfers on this address from now on, and return the port."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        listener = socket.create_server((ip, 0), family=family)
        threading.Thread(target=_accept, args=(listener, self._token), daemon=True).start()
        return int(listener.getsockname()[1])

    def measure(self, ip: str, port: int, limit_s: float) -> dict[str, Any]:
        """Latency to a probe that listens, half a round trip, and what one TCP stream carries there and back.

        In seconds and bytes per second, or the `error` that prevented it. Takes about limit_s at most.
        """
        try:
            with socket.create_connection((ip, port), timeout=limit_s / 2) as link:
                link.settimeout(limit_s / 2)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else pings wait to be sent together
                link.sendall(self._token)
                deadline = time.monotonic() + limit_s / 2
                latency_s = min(_timed(lambda: _ask(link, b"P", 1)) for _ in range(NUM_PINGS)) / 2
                return {
                    "latency_s": latency_s,
                    "out_bytes_per_s": _rate(lambda size: _ask(link, b"T", size), latency_s, deadline),
                    "in_bytes_per_s": _rate(lambda size: _ask(link, b"F", size), latency_s, deadline),
                }
        except OSError as error:
            return {"error": f"{type(error).__name__}: {error}"}


def _ask(link: socket.socket, what: bytes, count: int) -> None:
    """P: a ping. T: send bytes, and wait until they have arrived. F: receive bytes."""
    link.sendall(struct.pack(REQUEST, what, count))
    if what == b"T":
        _send(link, count)
    _receive(link, count if what == b"F" else 1)


def _accept(listener: socket.socket, token: bytes) -> None:
    while True:
        link, _ = listener.accept()
        threading.Thread(target=_serve, args=(link, token), daemon=True).start()


def _serve(link: socket.socket, token: bytes) -> None:
    """Answer the requests of `_ask` until the connection is closed or silent for a minute."""
    with contextlib.suppress(OSError), link:
        link.settimeout(60.0)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Whoever else reaches the port must not have this node send or receive gigabytes.
        if not hmac.compare_digest(_receive(link, len(token), keep=True), token):
            return
        while True:
            what, count = struct.unpack(REQUEST, _receive(link, struct.calcsize(REQUEST), keep=True))
            if count > MAX_BYTES:
                return
            if what == b"T":
                _receive(link, count)
            _send(link, count if what == b"F" else 1)


def _send(link: socket.socket, count: int) -> None:
    piece = memoryview(bytes(min(PIECE, count)))
    while count:
        count -= link.send(piece[:count])


def _receive(link: socket.socket, count: int, *, keep: bool = False) -> bytes:
    buffer, kept = bytearray(min(PIECE, count)), bytearray()
    while count:
        got = link.recv_into(buffer, min(len(buffer), count))
        if not got:
            raise ConnectionResetError("the other end hung up")
        if keep:
            kept += buffer[:got]
        count -= got
    return bytes(kept)


def _rate(transfer: Callable[[int], None], latency_s: float, deadline: float) -> float:
    """Bytes per second of a transfer that is long enough to tell, or of the longest that there is time for."""
    size = 2**18
    while True:
        taken_s = _timed(lambda: transfer(size))  # noqa: B023 Called at once.
        if taken_s >= FILL_S or size >= MAX_BYTES // 4 or time.monotonic() + 8 * taken_s > deadline:
            break
        size *= 4
    for _ in range(2):  # the best of three: what else runs there can only slow it down
        if time.monotonic() + taken_s < deadline:
            taken_s = min(taken_s, _timed(lambda: transfer(size)))
    # Besides the transfer the time holds one latency: of the request, or of the byte that confirms arrival.
    return size / max(1e-6, taken_s - latency_s)


def _timed(function: Callable[[], None]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("ray", "torch", "trimtab"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    with contextlib.suppress(ImportError):
        import torch

        versions["torch"] = torch.__version__
        versions["cuda"] = torch.version.cuda or "none"
        if torch.cuda.is_available():
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _digest(package: str) -> str:
    """The first 12 hex digits of a SHA-256 over all Python files of a package, by path and content."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return "missing"
    folder = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _devices() -> list[dict[str, Any]]:
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            return [{"name": device.name, "memory_bytes": device.total_memory} for device in found]
    return []


def _memory() -> dict[str, int]:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("total", "MemTotal"), ("free", "MemAvailable"))}


def _disk(path: Path) -> dict[str, int]:
    """Bytes of the file system on which the path lies, or would lie."""
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), Path("/"))
    usage = shutil.disk_usage(existing)
    return {"total": usage.total, "free": usage.free}
