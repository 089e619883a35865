"""Describes the machine and the settings that results depend on."""

import importlib.metadata
import os
import platform
from pathlib import Path

from benchmarks.peers.registry import ENTRANTS

TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
"""Lets glibc keep freed memory. By default each tensor of 32 MiB or more gets new pages from the kernel."""
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "tuned": TUNED_MALLOC}


def environment_of_ranks(allocator: str, threads: int) -> dict[str, str]:
    """This process's environment with the allocator and the threads of the race; all else passes through."""
    inherited = {name: value for name, value in os.environ.items() if name not in TUNED_MALLOC}
    ours = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    # Some peers warn in every step that there is no GPU.
    return inherited | ours | {"PYTHONWARNINGS": "ignore"} | ALLOCATORS[allocator]


def describe() -> dict[str, str]:
    """Processor, its matrix units and whether they may be used, versions."""
    processor = _cpuinfo()
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return {
        "cpu": processor.get("model name", platform.processor()),
        "cores": str(os.cpu_count()),
        "amx_bf16": "yes" if "amx_bf16" in processor.get("flags", "").split() else "no",
        "onednn": f"capped at {cap}" if cap else "not capped",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def versions(names: list[str]) -> dict[str, str]:
    """The installed version of each entrant."""
    return {name: ENTRANTS[name].version for name in names}


def _cpuinfo() -> dict[str, str]:
    """Of the first core; empty where there is no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    first_core = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first_core.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
