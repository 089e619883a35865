"""One rank's part of `trimtab bench dispatch`: layer and bare limits take turns, with fresh tokens in every round.

The order of the turns is reversed every other round, so that a machine that slows down favours none. The bare
all-to-alls come right after the layer, as they repeat the messages of its step.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.exchange.placement import ExpertPlacement
from dispatch.values import all_gather_values
from runtime.commands.bench.dispatch.case import LayerCase
from runtime.commands.bench.dispatch.layer_run import LayerRun, RankContext, Sample, schedules
from runtime.commands.bench.dispatch.limits import BareExchange, matmul_flops, matmul_limit
from runtime.commands.bench.dispatch.memory import peak_allocated_bytes, peak_cuda_bytes, peak_resident_bytes
from runtime.terminal.progress_line import ProgressLine

LAYER, MATMULS, EXCHANGE = "layer", "matmuls", "all-to-all"
Turn = Callable[[Tensor, Tensor], dict[str, Sample]]


@dataclass(frozen=True)
class DtypeSamples:
    """What was measured in one dtype; all ranks get the same.

    samples: by candidate, then rank, then round. Memory is the largest of the ranks, above weights and inputs;
    resident_bytes is None where the system does not tell.
    """

    samples: dict[str, list[list[Sample]]]
    allocated_bytes: int
    resident_bytes: int | None


@dataclass(frozen=True)
class LayerMeasurement:
    """The results of a whole benchmark. exchange: the one that was used."""

    exchange: str
    by_dtype: dict[str, DtypeSamples]


def measure(group: dist.ProcessGroup, device: torch.device, case: LayerCase) -> LayerMeasurement | None:
    """Measure on this rank. Collective; rank 0 returns the samples of all ranks, the others None."""
    torch.set_num_threads(case.threads)
    context = RankContext.of(case, group, device)
    exchange, by_dtype = "none", {}
    with ProgressLine(sys.stderr if context.rank == 0 else None) as progress:
        for number, dtype_name in enumerate(case.dtypes, 1):
            head = f"[{number}/{len(case.dtypes)}] {dtype_name}"
            progress.show(f"{head}: memory")
            tell = partial(_tell_round, progress, head, case.rounds)
            exchange, by_dtype[dtype_name] = _measure_dtype(case, getattr(torch, dtype_name), context, tell)
    return LayerMeasurement(exchange, by_dtype) if context.rank == 0 else None


def _tell_round(progress: ProgressLine, head: str, num_rounds: int, round_index: int) -> None:
    if round_index == 0:
        progress.show(f"{head}: warming up, then {num_rounds} rounds")
    else:
        progress.show_minor(f"{head}: round {round_index} of {num_rounds}")


def _measure_dtype(
    case: LayerCase, dtype: torch.dtype, context: RankContext, tell: Callable[[int], None]
) -> tuple[str, DtypeSamples]:
    build = {name: partial(LayerRun.build, case, dtype, each, context) for name, each in schedules(case).items()}
    memory = _memory(build[LAYER], context.device)
    runs = {name: make() for name, make in build.items()}
    turns = [_matmul_turn(case, dtype, context), *(_layer_turn(name, run) for name, run in runs.items())]
    mine: dict[str, list[Sample]] = {}
    for round_index in range(case.rounds + 1):  # the first warms up
        tell(round_index)
        x_TH, grad_TH = runs[LAYER].draw(round_index)
        for turn in turns[:: -1 if round_index % 2 else 1]:
            for name, sample in turn(x_TH, grad_TH).items():
                mine.setdefault(name, []).extend([sample] if round_index else [])
    return runs[LAYER].layer.dispatcher.exchange, _of_all_ranks(mine, memory, context)


def _matmul_turn(case: LayerCase, dtype: torch.dtype, context: RankContext) -> Turn:
    shape = case.shape
    num_local = ExpertPlacement(shape.num_experts, case.workers).num_local_experts[context.rank]
    run = matmul_limit(shape, num_local, case.workers, dtype, context.device)
    num_rows = num_local * shape.rows_per_expert(case.workers)
    flops = float(matmul_flops(num_rows, shape.hidden, shape.ffn_hidden))

    def turn(x_TH: Tensor, _grad_TH: Tensor) -> dict[str, Sample]:
        return {MATMULS: _timed(partial(run, x_TH), context) | {"flops": flops}}

    return turn


def _layer_turn(name: str, run: LayerRun) -> Turn:
    """Times a step of the layer, and for the schedule LAYER then its all-to-alls alone."""
    bare = BareExchange(run.context.device)

    def turn(x_TH: Tensor, grad_TH: Tensor) -> dict[str, Sample]:
        sample = _timed(partial(run.step, x_TH, grad_TH), run.context)
        sample |= run.account()
        run.clear(x_TH)
        if name != LAYER or run.case.workers == 1:
            return {name: sample}
        bare.prepare(run.messages)
        return {name: sample, EXCHANGE: _timed(bare.run, run.context) | {"bytes": float(bare.sent_bytes)}}

    return turn


def _timed(action: Callable[[], object], context: RankContext) -> Sample:
    """Seconds of the wall clock, and of the CPU in all threads of this process, gloo's included."""
    # Ranks begin together: the end of the previous turn on a slower rank must not be timed as waiting on this one.
    dist.barrier(context.group)
    _synchronize(context.device)
    began_wall, began_cpu = time.perf_counter(), time.process_time()
    action()
    _synchronize(context.device)
    return {"wall_s": time.perf_counter() - began_wall, "cpu_s": time.process_time() - began_cpu}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(build: Callable[[], LayerRun], device: torch.device) -> dict[str, int | None]:
    """Peak memory of the first two steps of a new layer: two, since it keeps some memory from a step for the next."""
    peaks: dict[str, int | None] = {}
    for name, measure_peak in _peak_measures(device).items():
        run = build()
        inputs = [run.draw(step) for step in range(2)]
        peaks[name] = None
        with contextlib.suppress(OSError):  # where /proc may not be written
            peaks[name] = measure_peak(partial(_steps, run, inputs))
    return peaks


def _peak_measures(device: torch.device) -> dict[str, Callable[[Callable[[], object]], int]]:
    if device.type == "cuda":
        return {"allocated_bytes": peak_cuda_bytes}
    return {"allocated_bytes": peak_allocated_bytes, "resident_bytes": peak_resident_bytes}


def _steps(run: LayerRun, inputs: list[tuple[Tensor, Tensor]]) -> None:
    for x_TH, grad_TH in inputs:
        run.step(x_TH, grad_TH)
        run.clear(x_TH)


def _of_all_ranks(mine: dict[str, list[Sample]], memory: dict[str, int | None], context: RankContext) -> DtypeSamples:
    every: list[tuple[dict[str, list[Sample]], dict[str, int | None]]]
    every = all_gather_values((mine, memory), context.group, tuple)
    resident = [peaks.get("resident_bytes") for _, peaks in every]
    return DtypeSamples(
        samples={name: [samples[name] for samples, _ in every] for name in mine},
        allocated_bytes=max(peaks["allocated_bytes"] or 0 for _, peaks in every),
        resident_bytes=None if None in resident else max(peak or 0 for peak in resident),
    )
