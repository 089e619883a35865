"""The peak memory of a step, measured on steps that are not timed. torch and the standard library only."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

CLEAR_PEAK = "5"  # written to clear_refs it sets VmHWM back to VmRSS: proc(5)


def peak_allocated_bytes(step: Callable[[], object]) -> int:
    """The most that torch's allocator has handed out at any moment of the step, above what it had before."""
    with _muted_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2: the profiler's C++ prints lines that no setting turns off."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_resident_bytes(step: Callable[[], object]) -> int:
    """The peak of the process's resident memory during the step, above what it had before."""
    # Garbage that goes during the step, or freed memory that the allocator keeps, would hide what the step takes.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def peak_cuda_bytes(step: Callable[[], object]) -> int:
    """The most that torch's allocator of the current CUDA device has handed out, above what it had before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise ValueError(f"/proc/self/status has no {field}: resident memory can be measured on Linux only")
