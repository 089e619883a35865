"""One MoE layer, forward and backward in bf16, beside its matmul limit and the layers of others, in turns.

All get the same weights and, in every round, the same fresh tokens. Each is first held against a plain loop in fp32.
Ratios are taken inside a round. Memory is what torch's allocator hands out during a step at most, above weights and
input; gradients of weights are in it.
"""

import gc
import importlib.metadata
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu import plain_torch
from benchmarks.gpu.section import Figures, Setting, first_line, head, row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import elapsed_ms, peak_mib
from benchmarks.peers import contestant, oracle
from benchmarks.peers.case import LayerWeights, TokenSource
from benchmarks.peers.contestant import Builder, Contestant
from benchmarks.peers.registry import ENTRANTS
from runtime.commands.bench.dispatch.limits import Shape, matmul_flops, matmul_limit

OURS, LIMIT = "trimtab", "matmul limit"
PLAIN, PLAIN_COMPILED = "plain torch", "plain torch, compiled"
TITAN, TITAN_COMPILED = "torchtitan", "torchtitan, compiled"


class NotCompiled(RuntimeError):
    """torch.compile ran the code without compiling anything."""


def measure(setting: Setting) -> None:
    """All shapes in bf16, each told when it is done."""
    if not dist.is_initialized():  # a contestant asks for its place among the ranks
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: Figures = {}
    for name, shape in setting.sizes.shapes.items():
        found[name] = measure_shape(shape, torch.bfloat16, setting.device, setting.sizes)
        setting.tell(found)
        gc.collect()
        torch.compiler.reset()  # frees what it compiled, and the layers with it
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def builders() -> dict[str, Builder]:
    """Who takes part, by name; the one of a package that is not installed raises when it is called."""
    return {
        OURS: ENTRANTS["trimtab"],
        PLAIN: plain_torch.build,
        PLAIN_COMPILED: _compiled(plain_torch.build),
        TITAN: _torchtitan,
        TITAN_COMPILED: _compiled(_torchtitan),
    }


def _torchtitan(setting: contestant.Setting, weights: LayerWeights) -> Contestant:
    try:
        importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError("torchtitan is not installed") from None
    return ENTRANTS["torchtitan"](setting, weights)


def _compiled(build: Builder) -> Builder:
    def build_compiled(setting: contestant.Setting, weights: LayerWeights) -> Contestant:
        plain = build(setting, weights)
        return replace(plain, forward=torch.compile(plain.forward))

    return build_compiled


def measure_shape(shape: Shape, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Figures:
    """Each contestant's figures by its name, or the reason why it has none; the limit's too."""
    steps, found = _ready(shape, dtype, device, sizes)
    limit = matmul_limit(shape, shape.num_experts, 1, dtype, device)
    for _ in range(sizes.warm_up):
        limit(_draw(shape, dtype, device))
    turns: dict[str, Callable[[Tensor, Tensor], None]] = {LIMIT: lambda x, _grad: limit(x), **steps}
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for round_index in range(sizes.rounds):
        x, grad = _draw(shape, dtype, device), _draw(shape, dtype, device)
        for name in list(turns)[:: -1 if round_index % 2 else 1]:
            samples[name].append(elapsed_ms(lambda: turns[name](x, grad), device))  # noqa: B023 - called at once
    operations = matmul_flops(shape.tokens * shape.top_k, shape.hidden, shape.ffn_hidden)
    for name, times in samples.items():
        found.setdefault(name, {}).update(_figures(times, samples, operations))
    return {"shape": vars(shape), "contestants": found}


def _ready(
    shape: Shape, dtype: torch.dtype, device: torch.device, sizes: Sizes
) -> tuple[dict[str, Callable[[Tensor, Tensor], None]], dict[str, Figures]]:
    """The steps of all that are right, warm; and of each its memory and error, or why it does not take part."""
    place = contestant.Setting(shape, dtype, _world())
    with device:
        weights = LayerWeights.draw(shape, dtype, torch.Generator(device).manual_seed(1))
    problem = _problem(place, weights, device)
    steps: dict[str, Callable[[Tensor, Tensor], None]] = {}
    found: dict[str, Figures] = {}
    for name, build in builders().items():
        is_compiled = name in (PLAIN_COMPILED, TITAN_COMPILED)
        graphs = _num_graphs() if is_compiled else 0
        try:
            with device:
                made = build(place, weights)
            errors = oracle.errors_of(made, problem, place)
            if refused := oracle.refusal(errors, dtype):
                raise ValueError(refused)
            step = _step_of(made)
            for _ in range(sizes.warm_up):
                step(_draw(shape, dtype, device), _draw(shape, dtype, device))
            if is_compiled and _num_graphs() == graphs:
                raise NotCompiled("torch.compile ran it without compiling anything")
            x, grad = _draw(shape, dtype, device), _draw(shape, dtype, device)
            found[name] = {"peak_mib": peak_mib(partial(step, x, grad), device), "error": max(errors.values())}
            steps[name] = step
        except Exception as error:  # noqa: BLE001 - whatever keeps one out, the others are measured
            found[name] = {"refused": first_line(error)}
    return steps, found


def _problem(place: contestant.Setting, weights: LayerWeights, device: torch.device) -> oracle.Problem:
    """Of all tokens: of another number torch.compile would make a second graph, for any number and not as fast."""
    shape, generator = place.shape, torch.Generator(device).manual_seed(2)
    with device:
        source = TokenSource(weights.router_EH, shape.top_k, place.dtype, torch.zeros(shape.hidden), generator)
        x = source.draw_clear(shape.tokens)
    return oracle.pose(place, weights, x, _draw(shape, place.dtype, device))


def _step_of(made: Contestant) -> Callable[[Tensor, Tensor], None]:
    def step(x: Tensor, grad: Tensor) -> None:
        made.step(x.detach().requires_grad_(), grad)
        made.reset()

    return step


def _figures(times: list[float], samples: Mapping[str, list[float]], operations: int) -> Figures:
    """ours_over_it: the time of ours over its own, so that less than 1 says that ours is faster."""
    middle = statistics.median(times)
    found = {"ms": middle, "tflops": operations / middle / 1e9, "times_limit": _ratio(times, samples[LIMIT])}
    if OURS in samples:
        found["ours_over_it"] = _ratio(samples[OURS], times)
    return found


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def _num_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape.tokens, shape.hidden, dtype=dtype, device=device)


def _world() -> Any:
    return dist.group.WORLD


def show(figures: Figures) -> list[str]:
    """A table for each shape."""
    lines = ["Forward and backward in bf16. Limit: the six matmuls as batched calls. Ratios are taken inside a round."]
    for name, found in figures.items():
        sizes = ", ".join(map(str, found["shape"].values()))
        lines += ["", *head(f"{name}: T, H, F, E, k = {sizes}", "ms", "TFLOP/s", "× limit", "ours / it", "peak, MiB")]
        lines += [_line(each, values) for each, values in found["contestants"].items()]
    return lines


def _line(name: str, found: Figures) -> str:
    if "refused" in found:
        return row(name, f"not measured: {found['refused']}", "", "", "", "")
    ratio = f"{found['ours_over_it']:.2f}" if "ours_over_it" in found else ""
    peak = f"{found['peak_mib']:.0f}" if found.get("peak_mib") else ""
    return row(name, f"{found['ms']:.2f}", f"{found['tflops']:.0f}", f"{found['times_limit']:.2f}", ratio, peak)
