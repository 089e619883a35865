"""Figures that others publish beside what the simulation says of the same setup. Nothing is fitted to any of them.

Rates are those of the presets (`runtime.commands.plan.simulate.hardware`): one H100 that this project measured in bf16.
Those of fp8 are of another source, since we measured none: DeepGEMM's README of its first commit (a6d97a1), H800,
matrices of DeepSeek-V3 with 4096 rows, weighed by their share of a layer's operations; and not of DeepGEMM, which came
after the training, but of the CUTLASS kernels before it, by the speed-up that is given.

What the setups do and the simulation knows nothing of: kernels that are not fused, waits of the host, losses of power
and clock, and the sends between pipeline stages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import ClusterConfig
from dispatch.config import MoEConfig
from runtime.commands.plan.simulate.hardware import PRESETS, Hardware
from runtime.commands.plan.simulate.simulation import Schedule, Simulated, Simulation
from runtime.commands.plan.simulate.sweep import factors_of
from runtime.commands.plan.simulate.work import Work, attention_work, expert_work, linear, norm, router_work
from runtime.commands.plan.subject import Subject
from runtime.settings.config import TrainConfig
from workers.gang.parallel import ParallelConfig
from workers.model.families import Settings, family_of
from workers.model.families.source import read_json
from workers.model.model_config import ModelConfig
from workers.run_config import RunConfig

DEEPSEEK_V3 = Path(__file__).parents[2] / "examples/deepseek-v3.json"
QWEN3_30B = ModelConfig(  # huggingface.co/Qwen/Qwen3-30B-A3B, config.json
    vocab_size=151936,
    hidden=2048,
    num_layers=48,
    num_dense_layers=0,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    query_key_norm="head",
    max_seq_len=4096,
    moe=MoEConfig(num_experts=128, top_k=8, ffn_hidden=768, num_shared_experts=0, score="softmax"),
)
# TFLOP/s, speed-up over the kernels before, and millions of weights: of attention's projections; of experts with 4096
# rows each, gate with up and down.
DEEP_GEMM_DENSE = ((1058, 1.1, 15.1), (990, 1.0, 37.7), (590, 1.0, 16.8), (1358, 1.2, 117.4))
DEEP_GEMM_GROUPED = ((1288, 1.2, 2), (1093, 1.1, 1))
# 20 of an H800's 132 multiprocessors carry the exchanges (arXiv 2412.19437, section 3.2.2).
LEFT_TO_COMPUTE = 112 / 132


@dataclass(frozen=True)
class Figure:
    """One published figure. of_step: what the simulated step says in its unit. taken: what was assumed besides."""

    name: str
    source: str
    published: float
    unit: str
    simulate: Callable[[], Simulated]
    of_step: Callable[[Simulated], float]
    taken: str


def before_deep_gemm(shapes: tuple[tuple[float, float, float], ...]) -> float:
    """FLOP/s of matmuls of these shapes, one after the other."""
    return 1e12 * sum(share for *_, share in shapes) / sum(share * faster / rate for rate, faster, share in shapes)


def in_fp8(hardware: Hardware, share: float = 1.0) -> Hardware:
    """With matmuls in fp8, and a share of the device for computing; attention stays in bf16.

    Of a device that is faster than an H800 in bf16, as many times faster.
    """
    times = share * hardware.dense_flops_per_s / PRESETS["h800"].dense_flops_per_s
    return replace(
        hardware,
        dense_flops_per_s=times * before_deep_gemm(DEEP_GEMM_DENSE),
        grouped_flops_per_s=times * before_deep_gemm(DEEP_GEMM_GROUPED),
        attention_flops_per_s=share * hardware.attention_flops_per_s,
    )


def with_quantising(simulation: Simulation, step: Simulated, again: Work | None = None) -> Simulated:
    """The step with what fp8 moves over memory besides, and with other work for each layer and micro-batch.

    For each input of a matmul 3 bytes forward (bf16 read, fp8 written) and 2 backward (transposed), for each gradient
    of an output 4 (read, written twice): arXiv 2412.19437, sections 3.3 and 3.5.2.
    """
    model, batch = simulation.config.model, simulation.batch
    layer = attention_work(model, batch) + router_work(model, batch) + expert_work(model, batch)
    # Rows of inputs and of outputs, of matmuls that read each once: bytes less those of the weights, about half each.
    moved = sum(each.num_bytes for each in layer.forward.matmuls if each.kind != "attention") / batch.element_bytes
    weights = sum(each.flops for each in layer.forward.matmuls if each.kind == "dense") / (2 * batch.tokens)
    weights += 3 * batch.num_local_experts * model.hidden * model.moe.ffn_hidden
    seconds = (moved - weights) / 2 * (3 + 2 + 4) / simulation.hardware.memory_bytes_per_s
    seconds += again.seconds(simulation.hardware) if again else 0.0
    schedule = simulation.schedule
    of_step = seconds * (model.num_layers + model.num_mtp_layers) * simulation.num_micro / schedule.stages
    return replace(step, parts=dict(step.parts) | {"fp8 and recompute": of_step / (1 - schedule.bubble)})


def deepseek_v3(*, mtp: int) -> ModelConfig:
    """Its model, with sequences of 4096 tokens."""
    settings = Settings(read_json(DEEPSEEK_V3), str(DEEPSEEK_V3))
    return replace(family_of(settings).read_config(settings), max_seq_len=4096, num_mtp_layers=mtp)


def subject(model: ModelConfig, ranks: int, ep_size: int, batch: int, micro: int, **parallel: str) -> Subject:
    """Ranks of one pipeline stage, 8 a node."""
    config = TrainConfig(
        run=RunConfig(global_batch_size=batch, micro_batch_size=micro, dtype="bfloat16"),
        model=model,
        parallel=ParallelConfig(ep_size=ep_size, **parallel),  # type: ignore[arg-type] # it checks them itself
        cluster=ClusterConfig(num_workers=ranks),
    )
    return Subject("public", config, 8, ())


def simulate_deepseek(max_vio: float = 0.0, overlap: float = 1.0) -> Simulated:
    """2048 H800: PP 16, EP 64 over 8 nodes, ZeRO-1, fp8, batches of 15360 sequences."""
    model = deepseek_v3(mtp=1)
    of_stage = subject(model, 128, 64, 15360, 1, shard="optimizer", exchange="node", payload="fp8")
    # DualPipe: (PP / 2 - 1)(F&B + B - 3 W) with F = W = 1, B = 2, F&B = 3, beside 120 micro-batches of F + B.
    bubble = 7 * 2 / (7 * 2 + 120 * 3)
    hardware = in_fp8(PRESETS["h800"], LEFT_TO_COMPUTE)
    simulation = Simulation(of_stage, hardware, Schedule(overlap=overlap, stages=16, bubble=bubble))
    step = simulation.step(factors_of(simulation, max_vio))
    # Section 3.2.3: norms and the projections up from latents are computed again in backward.
    tokens, sizes, heads = simulation.batch.tokens, model.latent, model.num_heads
    queries = linear(tokens, sizes.query_rank, heads * (sizes.nope_dim + sizes.rope_dim), 2)
    keys = linear(tokens, sizes.kv_rank, heads * (sizes.nope_dim + sizes.value_dim), 2)
    norms = norm(2 * tokens * model.hidden, 2)
    return with_quantising(simulation, step, (queries + keys + norms).forward)


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
    """Of a step."""
    return step.step_s


def speed(step: Simulated) -> float:
    """Tokens per second and GPU."""
    return step.tokens_per_s_per_rank


AUTOMODEL = "docs.nvidia.com/nemo/automodel/latest/performance-summary.html"
MEGATRON = "github.com/NVIDIA-NeMo/Megatron-Bridge 067f987, docs/performance-summary-archive.md, 26.04.01"
V3 = ("arXiv 2412.19437, table 1", 2.664, "M H800 hours")
RECIPE = "recompute, as in examples/benchmark/configs of its repository; load forced to be even"
FORCED = "no recompute; load forced to be even"
# `sign` at its end in the run of docs/replay.md: of a small model, but measured.
SOME_VIO = 0.31
FIGURES = (
    Figure("DeepSeek-V3, pre-training", *V3, simulate_deepseek, hours, "all exchanges hidden; even load"),
    Figure("the same", *V3, lambda: simulate_deepseek(SOME_VIO), hours, f"a MaxVio of {SOME_VIO} (docs/replay.md)"),
    Figure("the same", *V3, lambda: simulate_deepseek(overlap=0.5), hours, "half as well hidden; even load"),
    Figure("the same", *V3, lambda: simulate_deepseek(overlap=0.0), hours, "no exchange hidden; even load"),
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
        "Megatron, DeepSeek-V3, 256 B200, fp8", MEGATRON, 3328, "tokens/s", simulate_megatron_deepseek, speed, FORCED
    ),
)


def print_public() -> None:
    """A table, and the parts of each step."""
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
