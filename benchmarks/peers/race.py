"""The race: builds all layers from the same weights, checks them against the oracle, then times them in turns.

All layers are in the same processes, one for each rank, and take turns, A B C and then C B A. Each round has fresh
tokens, the same for all layers, and ratios are taken inside a round, so that the machine's noise hits all layers alike.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import oracle
from benchmarks.peers.case import (
    Case,
    LayerWeights,
    TokenSource,
    common_component,
    tokens_per_expert,
)
from benchmarks.peers.contestant import Builder, Setting
from benchmarks.peers.meters import WireMeter
from runtime.commands.bench.dispatch.limits import matmul_limit
from runtime.commands.bench.dispatch.memory import peak_allocated_bytes, peak_resident_bytes

LIMIT = "matmul limit"
T = TypeVar("T")
Say = Callable[[str], None]


class Runner(Protocol):
    """A participant that takes turns: a layer, or the limit."""

    def step(self, x_TH: Tensor, grad_output_TH: Tensor) -> Tensor: ...

    def reset(self) -> None: ...


@dataclass(frozen=True)
class MatmulLimit:
    """The bare matmuls of the same work, as a runner."""

    matmuls: Callable[[Tensor], None]

    def step(self, x_TH: Tensor, grad_output_TH: Tensor) -> Tensor:
        """Run the matmuls; the tokens do not matter."""
        self.matmuls(x_TH)
        return x_TH

    def reset(self) -> None:
        """Nothing to drop."""


@dataclass
class Entry:
    """The results of one runner, or the reason why there are none."""

    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    allocated_bytes: int = 0
    resident_bytes: int = 0
    wire_bytes: int = 0
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """The outcome of one race: the load of the busiest expert over the mean, and an entry for each name."""

    hottest_over_mean: float
    entries: dict[str, Entry]

    def ratios(self, name: str, base: str, clock: str = "wall_s") -> list[float]:
        """Seconds of `name` over those of `base`, round by round."""
        pairs = zip(getattr(self.entries[name], clock), getattr(self.entries[base], clock), strict=True)
        return [value / limit for value, limit in pairs]

    def median_ratio(self, name: str, base: str, clock: str = "wall_s") -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios(name, base, clock))


def run_case(case: Case, builders: Mapping[str, Builder], ep_group: dist.ProcessGroup, say: Say) -> Outcome:
    """Run one race on the ranks of `ep_group`. Collective; every rank returns the same outcome."""
    torch.set_num_threads(case.threads)
    setting = Setting(case.shape, case.dtype, ep_group)
    shared = torch.Generator().manual_seed(0)  # weights and popularity are the same on all ranks, tokens are not
    weights = LayerWeights.draw(case.shape, case.dtype, shared)
    source = _token_source(case, setting, weights, shared)
    entries = _check_all(setting, weights, source, builders, say)
    raced = [name for name, entry in entries.items() if entry.reason is None]
    say(f"measuring {', '.join(raced) or 'nobody'}: {case.rounds} rounds")
    entries = {LIMIT: Entry()} | entries
    build_runner: dict[str, Callable[[], Runner]] = {LIMIT: partial(_limit, setting)}
    build_runner |= {name: partial(builders[name], setting, weights) for name in raced}
    runners = {
        name: _measure_memory_and_wire(entries[name], build, source, setting) for name, build in build_runner.items()
    }
    _take_turns(entries, runners, source, setting, case.rounds)
    for name in runners:
        entries[name] = _over_ranks(entries[name], setting)
    return Outcome(_measured_load(weights, source, setting), entries)


def _token_source(case: Case, setting: Setting, weights: LayerWeights, shared: torch.Generator) -> TokenSource:
    own = torch.Generator().manual_seed(1 + setting.ep_rank)
    common_H = common_component(weights, case.shape.top_k, shared) if case.skewed else torch.zeros(case.shape.hidden)
    return TokenSource(weights.router_EH, case.shape.top_k, case.dtype, common_H, own)


def _limit(setting: Setting) -> MatmulLimit:
    return MatmulLimit(matmul_limit(setting.shape, len(setting.expert_ids), setting.ep_size, setting.dtype))


def _check_all(
    setting: Setting, weights: LayerWeights, source: TokenSource, builders: Mapping[str, Builder], say: Say
) -> dict[str, Entry]:
    """An entry for every layer, with its errors or the reason why it may not race."""
    num_tokens = setting.shape.tokens
    problem = oracle.pose(setting, weights, source.draw_clear(num_tokens), _cotangent(source, num_tokens))
    entries = {}
    for name, build in builders.items():
        say(f"building and checking {name}")
        entries[name] = _build_and_check(build, weights, problem, setting)
    return entries


def _build_and_check(build: Builder, weights: LayerWeights, problem: oracle.Problem, setting: Setting) -> Entry:
    """The errors, the largest over the ranks; a reason if any rank has one."""
    layer, reason = _attempt(lambda: build(setting, weights))
    if reason := _first_reason(reason, setting):
        return Entry(reason=reason)
    errors, reason = _attempt(lambda: oracle.errors_of(layer, problem, setting))
    if reason := _first_reason(reason, setting):
        return Entry(reason=reason)
    by_rank = _gather(errors, setting)
    worst = {name: max((each[name] for each in by_rank), key=_nan_last) for name in by_rank[0]}
    return Entry(reason=oracle.refusal(worst, setting.dtype), errors=worst)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    # The code of another project may fail in any way. Not BaseException, which would also catch an interrupt.
    except Exception as error:  # noqa: BLE001
        first_line = str(error).strip().split("\n")[0]
        return None, f"{type(error).__name__}: {first_line}"


def _nan_last(error: float) -> tuple[bool, float]:
    return math.isnan(error), error


def _gather(mine: T, setting: Setting) -> list[T]:
    everyone: list[T] = [mine] * setting.ep_size
    dist.all_gather_object(everyone, mine, group=setting.ep_group)
    return everyone


def _first_reason(reason: str | None, setting: Setting) -> str | None:
    """A reason of any rank: no rank may step a layer that another rank lacks, or it would wait for that rank."""
    return next((each for each in _gather(reason, setting) if each), None)


def _cotangent(source: TokenSource, num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, len(source.common_H), generator=source.generator).to(source.dtype)


def _measure_memory_and_wire(
    entry: Entry, build: Callable[[], Runner], source: TokenSource, setting: Setting
) -> Runner:
    """Measure memory and bytes sent, which need no repetition; returns the runner that was built last.

    Both kinds of memory are measured over the first two steps of a new runner, so that what a layer keeps from one step
    for the next is counted: before a later step it would be there already. Kernels and libraries are warm from the
    check.
    """
    num_tokens = setting.shape.tokens
    inputs = [(source.draw(num_tokens), _cotangent(source, num_tokens)) for _ in range(2)]
    runner = build()
    entry.allocated_bytes = peak_allocated_bytes(partial(_steps, runner, inputs))
    runner = build()
    entry.resident_bytes = peak_resident_bytes(partial(_steps, runner, inputs))
    with WireMeter() as wire:
        _steps(runner, inputs[:1])
    entry.wire_bytes = wire.num_bytes
    return runner


def _steps(runner: Runner, inputs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for x_TH, grad_output_TH in inputs:
        runner.step(x_TH, grad_output_TH)
        _clear(runner, x_TH)


def _take_turns(
    entries: dict[str, Entry], runners: Mapping[str, Runner], source: TokenSource, setting: Setting, rounds: int
) -> None:
    grad_output_TH = _cotangent(source, setting.shape.tokens)
    for round_index in range(-1, rounds):  # one to warm up
        x_TH = source.draw(setting.shape.tokens)
        for name in list(runners)[:: 1 if round_index % 2 else -1]:
            wall_s, cpu_s = _timed_step(runners[name], x_TH, grad_output_TH, setting)
            if round_index >= 0:
                entries[name].wall_s.append(wall_s)
                entries[name].cpu_s.append(cpu_s)


def _timed_step(runner: Runner, x_TH: Tensor, grad_output_TH: Tensor, setting: Setting) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of all threads of this process, those of gloo included."""
    if setting.ep_size > 1:
        dist.barrier(setting.ep_group)
    began_wall, began_cpu = time.perf_counter(), time.process_time()
    y_TH = runner.step(x_TH, grad_output_TH)
    seconds = time.perf_counter() - began_wall, time.process_time() - began_cpu
    del y_TH
    _clear(runner, x_TH)
    return seconds


def _clear(runner: Runner, x_TH: Tensor) -> None:
    """Drop the gradients of this runner, which would count as memory of the next one."""
    runner.reset()
    x_TH.grad = None


def _over_ranks(entry: Entry, setting: Setting) -> Entry:
    """One entry for all ranks: the slowest rank's wall time, the mean CPU time and bytes, the largest memory."""
    every = _gather(entry, setting)
    return Entry(
        errors=entry.errors,
        allocated_bytes=max(each.allocated_bytes for each in every),
        resident_bytes=max(each.resident_bytes for each in every),
        wire_bytes=round(statistics.mean(each.wire_bytes for each in every)),
        wall_s=[max(values) for values in zip(*(each.wall_s for each in every), strict=True)],
        cpu_s=[statistics.mean(values) for values in zip(*(each.cpu_s for each in every), strict=True)],
    )


def _measured_load(weights: LayerWeights, source: TokenSource, setting: Setting) -> float:
    """Load of the busiest expert over the mean, for a sample of all ranks."""
    logits_TE = source.draw(setting.shape.tokens).detach().float() @ weights.router_EH.t()
    counts_E = tokens_per_expert(logits_TE, setting.shape.top_k)
    dist.all_reduce(counts_E, group=setting.ep_group)
    return float(counts_E.max() / counts_E.float().mean())
