"""One training step by kernel: what is left above matmuls and attention. That of the section `training`, no Ray."""

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from benchmarks.gpu.section import Figures, Setting, head, row
from benchmarks.gpu.timing import synchronize
from runtime.job.coordinator import CoordinatorPolicy
from runtime.job.launch import make_spec
from runtime.settings.config_file import parse_train
from workers.data.prepare import prepare_dataset
from workers.training.step import Trainer
from workers.worker import Worker

EXPERTS, DENSE, ATTENTION = "expert matmuls", "dense matmuls", "attention"
OPTIMIZER, OURS, REST = "optimizer", "our kernels", "the rest: passes over memory"
GROUPS = (EXPERTS, DENSE, ATTENTION, OPTIMIZER, OURS, REST)
OUR_KERNELS = {"_sum", "_copy", "_mm", "_forward", "_backward"}  # of dispatch/kernels
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::dot", "aten::mv"}
NUM_WARM_UP, NUM_STEPS, NUM_SHOWN = 3, 3, 15


class NothingProfiled(RuntimeError):
    """The profiler tells nothing of the device."""


@dataclass(frozen=True)
class Launch:
    """Time of a kernel, or of all kernels of one name. operators: from the one that launched it to the outermost."""

    kernel: str
    operators: tuple[str, ...]
    us: float


def measure(setting: Setting) -> None:
    """Steps without the profiler first: their time, and the most memory; then one with it."""
    run_dir = setting.folder / "profiled"
    run_dir.mkdir()
    arguments = [*setting.sizes.training, "--workers", "1", "--device", setting.device.type]
    config = parse_train(arguments).config
    spec = make_spec(config, run_dir, prepare_dataset(config.data))
    worker = Worker(replace(spec, call_coordinator=CoordinatorPolicy().handle))
    worker.join(rank=0, world_size=1, store=dist.HashStore(), timeout_s=120.0)
    try:
        _measure_steps(worker, setting)
    finally:
        worker.leave()


def _measure_steps(worker: Worker, setting: Setting) -> None:
    state = worker._state  # noqa: SLF001 - a run without its driver, as the launcher of the tests makes it
    with state.open_control() as control:
        trainer = state.trainer(control)
        found = _timed_steps(trainer, setting.device)
        setting.tell(found)
        launches = profile_step(trainer, NUM_WARM_UP + NUM_STEPS + 1, setting.device)
    setting.tell(found | summary(launches))


def _timed_steps(trainer: Trainer, device: torch.device) -> Figures:
    """peak_mib: of torch's allocator, all that the process holds there."""
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(1, NUM_WARM_UP + NUM_STEPS + 1):
        synchronize(device)
        began = time.perf_counter()
        trainer.step(step)
        synchronize(device)
        times.append(time.perf_counter() - began)
    middle = statistics.median(times[NUM_WARM_UP:])
    found: Figures = {"step_ms": 1e3 * middle, "tokens_per_s": trainer.num_step_tokens / middle}
    if device.type == "cuda" and (peak := torch.cuda.max_memory_allocated(device)):
        found["peak_mib"] = peak / 2**20
    return found


def profile_step(trainer: Trainer, step: int, device: torch.device) -> list[Launch]:
    """What a step launches. On a CPU an operator stands for a kernel."""
    is_cuda = device.type == "cuda"
    if is_cuda and ProfilerActivity.CUDA not in supported_activities():
        raise NothingProfiled("the profiler of this torch sees no kernels of a device")
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_cuda]) as profiler:
        trainer.step(step)
        synchronize(device)
    events = list(profiler.events())
    if not is_cuda:
        return [Launch(event.name, _operators(event), event.self_cpu_time_total) for event in events]
    if not (launches := launches_of(events)):
        raise NothingProfiled("the profiler saw no kernel of the device")
    return launches


def launches_of(events: Sequence[Any]) -> list[Launch]:
    """Each kernel with the operators that it belongs to; the profiler does not know those of every kernel."""
    known = [
        Launch(kernel.name, _operators(event), kernel.duration)
        for event in events
        if event.device_type == DeviceType.CPU
        for kernel in event.kernels
    ]
    total_us: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            total_us[event.name] += event.time_range.elapsed_us()
    for launch in known:
        total_us[launch.kernel] -= launch.us
    return known + [Launch(kernel, (), us) for kernel, us in total_us.items() if us > 0]


def _operators(event: Any) -> tuple[str, ...]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(names)


def group_of(launch: Launch) -> str:
    """The group by the operators; by the kernel's name where the profiler knows none."""
    kernel, around = launch.kernel, " ".join(launch.operators)
    if kernel in OUR_KERNELS:
        return OURS
    if "Optimizer.step" in around or _has(kernel, "adam", "multi_tensor_apply"):
        return OPTIMIZER
    if _has(around, "attention") or _has(kernel, "sdpa", "flash_fwd", "flash_bwd", "fmha", "attention"):
        return ATTENTION
    if "aten::_grouped_mm" in launch.operators or _has(kernel, "grouped", "GroupProblem"):
        return EXPERTS
    if MATMULS & set(launch.operators) or _has(kernel, "gemm", "nvjet", "cutlass", "splitk"):
        # Where torch has no grouped matmul for the device, the experts' are one after the other.
        return EXPERTS if "FusedSwiGLU" in around else DENSE
    return REST


def _has(name: str, *parts: str) -> bool:
    return any(part.lower() in name.lower() for part in parts)


def summary(launches: Iterable[Launch]) -> Figures:
    """Milliseconds of each group, and of the longest kernels of the rest by name."""
    groups, rest = dict.fromkeys(GROUPS, 0.0), Counter[str]()
    for launch in launches:
        group = group_of(launch)
        groups[group] += launch.us / 1e3
        if group == REST:
            rest[f"{launch.operators[0]}: {launch.kernel}" if launch.operators else launch.kernel] += launch.us / 1e3
    return {"kernels_ms": sum(groups.values()), "groups_ms": groups, "rest_ms": dict(rest.most_common(NUM_SHOWN))}


def show(figures: Figures) -> list[str]:
    """The step, its groups, and the longest kernels of the rest."""
    speed = f"{figures['step_ms']:.1f} ms, {figures['tokens_per_s']:,.0f} tokens/s"
    peak = f"{figures['peak_mib'] / 1024:.1f} GiB" if "peak_mib" in figures else "(not measured)"
    lines = [f"Without the profiler a step takes {speed}; torch's allocator hands out {peak} at most."]
    if "groups_ms" not in figures:
        return lines
    total = figures["kernels_ms"]
    lines += ["", *head("kernels of a step", "ms", "share")]
    lines += [row(name, f"{ms:.1f}", f"{100 * ms / total:.0f} %") for name, ms in figures["groups_ms"].items()]
    lines += [row("together", f"{total:.1f}", ""), "", *head("longest of the rest", "ms")]
    return lines + [row(f"`{name[:120]}`", f"{ms:.2f}") for name, ms in figures["rest_ms"].items()]
