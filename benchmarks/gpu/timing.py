"""Times of calls on the device, and how much of it they take."""

import time
from collections.abc import Callable

import torch

from runtime.commands.bench.dispatch.memory import peak_allocated_bytes, peak_cuda_bytes


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, by events on CUDA."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """The most that torch's allocator has handed out during the call, above what it had before."""
    peak = peak_cuda_bytes if device.type == "cuda" else peak_allocated_bytes
    return peak(call) / 2**20


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
