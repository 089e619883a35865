"""Python imports this first where its folder is on PYTHONPATH: here the process has two emulated GPUs.

For processes that are not ours to start: Ray's, and the workers in them. Each module is changed when it is imported.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[3]
NUM_GPUS = 2


def _torch_cuda(torch_cuda: ModuleType) -> None:
    torch_cuda.is_available, torch_cuda.device_count = lambda: True, lambda: NUM_GPUS
    torch_cuda.get_device_name = lambda _device=None: "an emulated H100"


def _gpus_of_ray(accelerators: ModuleType) -> None:
    manager = accelerators.NvidiaGPUAcceleratorManager
    manager.get_current_node_num_accelerators = staticmethod(lambda: NUM_GPUS)
    manager.get_current_node_accelerator_type = staticmethod(lambda: "H100")


def _worker(module: ModuleType) -> None:
    for name in ("join", "train", "evaluate", "generate"):
        setattr(module.Worker, name, _on_device(getattr(module.Worker, name)))


def _ranks_of_a_command(launch: ModuleType) -> None:
    launch._spawned_rank = _on_device(launch._spawned_rank)
    launch._rank_device = lambda _device, _local_rank: importlib.import_module("torch").device("cuda", 0)


def _process_of_a_section(process: ModuleType) -> None:
    process.in_process = _on_device(process.in_process)


def _on_device(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        from tests.emulated_cuda.device import emulated_cuda

        with emulated_cuda():
            return method(*args, **kwargs)

    return run


class _Changes(MetaPathFinder):
    """Finds what is to be changed as Python does, and changes it when it has been loaded."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        change = self._changes.pop(name, None)
        found = importlib.util.find_spec(name) if change is not None else None
        if found is None or change is None:
            return None
        found.loader = _Changed(found.loader, change)
        return found


class _Changed(Loader):
    def __init__(self, loader: Any, change: Callable[[ModuleType], None]) -> None:
        self._loader, self._change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)


sys.path.append(str(ROOT))  # tests.emulated_cuda
sys.meta_path.insert(
    0,
    _Changes(
        {
            "torch.cuda": _torch_cuda,
            "ray._private.accelerators.nvidia_gpu": _gpus_of_ray,
            "workers.worker": _worker,
            "dispatch.parity.launch": _ranks_of_a_command,
            "benchmarks.gpu.process": _process_of_a_section,
        }
    ),
)
