"""Compares figures that others publish with the simulation of the same setup. Nothing is fitted to any of them.

The simulation does not know kernels that are not fused, waits of the host, limits of power and clock rate, and messages
between pipeline stages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.simulate.deepseek import moved, simulate_pretraining, simulate_profile
from benchmarks.simulate.setups import QWEN3_30B, deepseek_v3, in_fp8, subject, with_quantising
from runtime.commands.plan.simulate.hardware import PRESETS
from runtime.commands.plan.simulate.simulation import Schedule, Simulated, Simulation


@dataclass(frozen=True)
class Figure:
    """One published figure. of_step: its value in the simulated step, in `unit`. taken: what else was assumed."""

    name: str
    source: str
    published: float
    unit: str
    simulate: Callable[[], Simulated]
    of_step: Callable[[Simulated], float]
    taken: str


def simulate_automodel_qwen() -> Simulated:
    """8 H100: EP 8, FSDP, recompute, micro-batches of 4."""
    model = replace(QWEN3_30B, recompute="full")
    return Simulation(subject(model, 8, 8, 512, 4, shard="full"), PRESETS["h100"]).step()


def simulate_automodel_deepseek(ranks: int, batch: int) -> Simulated:
    """H100: PP 4 with 8 virtual stages each, EP 64, FSDP, recompute."""
    model = replace(deepseek_v3(mtp=0), recompute="full")
    of_stage = subject(model, ranks // 4, 64, batch, 1, shard="optimizer", exchange="node")
    # Interleaved 1F1B: (PP - 1) / (micro-batches x virtual stages), of 8 micro-batches at a time.
    idle = 3 / (8 * 8)
    return Simulation(of_stage, PRESETS["h100"], Schedule(stages=4, bubble=idle / (1 + idle))).step()


def simulate_megatron_qwen() -> Simulated:
    """16 H100: EP 16, fp8, micro-batches of 1."""
    of_all = subject(QWEN3_30B, 16, 16, 1024, 1, shard="optimizer", payload="compute")
    simulation = Simulation(of_all, in_fp8(PRESETS["h100"]))
    return with_quantising(simulation, simulation.step())


def simulate_megatron_deepseek() -> Simulated:
    """256 B200: PP 8 with 2 virtual stages each, EP 32, fp8 (MXFP8), batches of 4096 sequences."""
    model = deepseek_v3(mtp=1)
    of_stage = subject(model, 32, 32, 4096, 1, shard="optimizer", exchange="node")
    idle = 7 / (128 * 2)
    simulation = Simulation(of_stage, in_fp8(PRESETS["b200"]), Schedule(stages=8, bubble=idle / (1 + idle)))
    return with_quantising(simulation, simulation.step())


def hours(step: Simulated) -> float:
    """Million GPU hours for 14.8T tokens."""
    return 14.8e12 / step.tokens_per_s_per_rank / 3600 / 1e6


def seconds(step: Simulated) -> float:
    """Seconds of a step."""
    return step.step_s


def milliseconds(step: Simulated) -> float:
    """Milliseconds of a step."""
    return 1e3 * step.step_s


def speed(step: Simulated) -> float:
    """Tokens per second and GPU."""
    return step.tokens_per_s_per_rank


AUTOMODEL = "docs.nvidia.com/nemo/automodel/latest/performance-summary.html"
MEGATRON = "github.com/NVIDIA-NeMo/Megatron-Bridge 067f987, docs/performance-summary-archive.md, 26.04.01"
V3 = ("arXiv 2412.19437, table 1", 2.664, "M H800 hours")
RECIPE = "recompute, as in examples/benchmark/configs of its repository; load forced to be even"
FORCED = "no recompute; load forced to be even"
EXPOSED = f"no exchange hidden, though the recipe hides them; {FORCED}"
# The MaxVio under `sign` at the end of the run of docs/replay.md: of a small model, but measured.
SOME_VIO = 0.31
PROFILE = ("github.com/deepseek-ai/profile-data 4496024, train.json", 129.0, "ms")
OWN_VIO = f"a MaxVio of {SOME_VIO} (docs/replay.md)"
FIGURES = (
    Figure("DeepSeek-V3, pre-training", *V3, simulate_pretraining, hours, "DualPipe; even load"),
    Figure("the same", *V3, lambda: simulate_pretraining(SOME_VIO), hours, f"DualPipe; {OWN_VIO}"),
    Figure("its profile, 4 MoE layers", *PROFILE, simulate_profile, milliseconds, "exchanges hidden; even load"),
    Figure("Automodel, Qwen3-30B-A3B, 8 H100", AUTOMODEL, 21.773, "s", simulate_automodel_qwen, seconds, RECIPE),
    Figure(
        "Automodel, DeepSeek-V3, 256 H100",
        AUTOMODEL,
        8.18,
        "s",
        lambda: simulate_automodel_deepseek(256, 512),
        seconds,
        RECIPE,
    ),
    Figure(
        "Automodel, DeepSeek-V3, 1024 H100",
        AUTOMODEL,
        37.87,
        "s",
        lambda: simulate_automodel_deepseek(1024, 8192),
        seconds,
        RECIPE,
    ),
    Figure("Megatron, Qwen3-30B-A3B, 16 H100, fp8", MEGATRON, 8960, "tokens/s", simulate_megatron_qwen, speed, FORCED),
    Figure(
        "Megatron, DeepSeek-V3, 256 B200, fp8", MEGATRON, 3328, "tokens/s", simulate_megatron_deepseek, speed, EXPOSED
    ),
)


def print_public() -> None:
    """Print a table, the parts of each step, and how each assumption changes the hours of DeepSeek-V3."""
    print("| what | published | simulated | error | source | assumed |\n|---|---|---|---|---|---|")
    steps = [(figure, figure.simulate()) for figure in FIGURES]
    for figure, step in steps:
        value = figure.of_step(step)
        error = f"{100 * (value / figure.published - 1):+.0f} %"
        numbers = (f"{figure.published:g} {figure.unit}", f"{value:.3g}", error)
        print(f"| {' | '.join((figure.name, *numbers, figure.source, figure.taken))} |")
    for figure, step in steps:
        parts = ", ".join(f"{name} {seconds / step.step_s:.0%}" for name, seconds in step.parts.items())
        print(f"\n{figure.name}: step {step.step_s:.2f} s; {parts}")
    print("\n| DeepSeek-V3, an assumption | M hours at 0.8 | at 1.2 |\n|---|---|---|")
    for name, moved_steps in moved():
        print(f"| {name} | {' | '.join(f'{hours(each):.3g}' for each in moved_steps)} |")
