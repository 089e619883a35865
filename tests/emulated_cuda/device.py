"""What torch.cuda, torch.distributed, FSDP and Triton have to know of the emulated device."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param
from triton.runtime import interpreter

from tests.emulated_cuda.tensor import DEVICE, WAITS, MakesTensors, held_of, poison


class Event:
    """The host waits for it; the device, which does one thing after the other, need not."""

    def __init__(self, **_options: bool) -> None:
        """Of any kind."""

    def record(self, stream: Any = None) -> None:
        self.recorded_s = time.perf_counter()  # the work is done when it is asked for

    def synchronize(self) -> None:
        WAITS.note()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.recorded_s - self.recorded_s)


class Stream:
    """All streams are one."""

    device = DEVICE

    def __init__(self, *_place: Any, **_options: Any) -> None:
        """On the only device."""

    def record_event(self) -> Event:
        return Event()

    def wait_stream(self, other: "Stream") -> None: ...
    def wait_event(self, event: Event) -> None: ...


class Cudart:
    """Page-locked memory, which the host always has."""

    def cudaHostRegister(self, *_place: int) -> int:  # noqa: N802 - CUDA's name
        return 0

    def cudaHostUnregister(self, *_place: int) -> int:  # noqa: N802
        return 0


CUDA: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "_lazy_init": lambda: None,
    "check_error": lambda _code: None,
    "cudart": Cudart,
    "current_device": lambda: 0,
    "current_stream": Stream,
    "device": lambda _device: nullcontext(),
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda _device=None: (9, 0),
    "get_device_name": lambda _device=None: "NVIDIA H100 80GB HBM3",
    "get_rng_state": lambda _device=None: torch.zeros(16, dtype=torch.uint8),
    "is_available": lambda: True,
    "is_bf16_supported": lambda: True,
    "is_initialized": lambda: True,
    "max_memory_allocated": lambda _device=None: 0,
    "memory_allocated": lambda _device=None: 0,
    "memory_reserved": lambda _device=None: 0,
    "reset_peak_memory_stats": lambda _device=None: None,
    "set_device": lambda _device: None,
    "set_rng_state": lambda _state, _device=None: None,
    "set_sync_debug_mode": WAITS.forbid,
    "stream": lambda _stream: nullcontext(),
    "synchronize": lambda _device=None: WAITS.note(),
}


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """This process has the device. Needs `library`, loaded before torch."""
    launch, join = interpreter.GridExecutor.__call__, dist.init_process_group

    def launch_on_host(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        return launch(kernel, *map(held_of, args), **{name: held_of(value) for name, value in kwargs.items()})

    def join_by_gloo(_backend: str, *, device_id: Any = None, **kwargs: Any) -> None:
        join("gloo", **kwargs)

    with ExitStack() as stack:
        for name, value in CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch_on_host))
        stack.enter_context(mock.patch.object(dist, "init_process_group", join_by_gloo))
        # What FSDP frees must not be read. It resizes storages, which these tensors do not have.
        stack.enter_context(
            mock.patch.object(_fsdp_param, "free_storage", lambda tensor: poison(held_of(tensor.detach())))
        )
        stack.enter_context(mock.patch.object(_fsdp_param, "alloc_storage", lambda _tensor: None))
        torch.__future__.set_overwrite_module_params_on_conversion(
            True
        )  # `Module.to`: a parameter cannot change its kind
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its numbers on the host, as the mode expects
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(MakesTensors())
        yield
