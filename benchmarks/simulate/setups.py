"""Models, rates and ranks of setups that others publish.

Rates are those of the presets (`runtime.commands.plan.simulate.hardware`), from an H100 that this project measured in
bf16. It measured no fp8. Rates of fp8 are from the README of DeepGEMM's first commit (a6d97a1): H800, matrices of
DeepSeek-V3 with 4096 rows, weighed by their share of a layer's operations. DeepGEMM came after the training, so they
are divided by the README's speed-ups, which gives the rates of the CUTLASS kernels before it.
"""

from dataclasses import replace
from pathlib import Path

from cluster.config import ClusterConfig
from dispatch.config import MoEConfig
from runtime.commands.plan.simulate.hardware import PRESETS, Hardware
from runtime.commands.plan.simulate.simulation import Simulated, Simulation
from runtime.commands.plan.simulate.work import attention_work, expert_work, router_work
from runtime.commands.plan.subject import Subject
from runtime.settings.config import TrainConfig
from workers.distributed.parallel import ParallelConfig
from workers.model.families import Settings, family_of
from workers.model.hugging_face.source import read_json
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


def before_deep_gemm(shapes: tuple[tuple[float, float, float], ...]) -> float:
    """FLOP/s of matmuls of these shapes, one after the other."""
    return 1e12 * sum(share for *_, share in shapes) / sum(share * faster / rate for rate, faster, share in shapes)


def in_fp8(hardware: Hardware, share: float = 1.0) -> Hardware:
    """The hardware with matmuls in fp8 and attention in bf16. share: the part of the device that computes.

    A device that is faster than an H800 in bf16 is taken to be as many times faster in fp8.
    """
    times = share * hardware.dense_flops_per_s / PRESETS["h800"].dense_flops_per_s
    return replace(
        hardware,
        dense_flops_per_s=times * before_deep_gemm(DEEP_GEMM_DENSE),
        grouped_flops_per_s=times * before_deep_gemm(DEEP_GEMM_GROUPED),
        attention_flops_per_s=share * hardware.attention_flops_per_s,
    )


def fp8_layer(simulation: Simulation) -> tuple[float, float]:
    """Seconds, forward and backward, of the memory traffic that fp8 adds to one layer of one micro-batch.

    For each element of a matmul's input it is 3 bytes forward (bf16 read, fp8 written) and 2 backward (transposed), for
    each element of an output's gradient 4 (read, written twice): arXiv 2412.19437, sections 3.3 and 3.5.2.
    """
    model, batch = simulation.config.model, simulation.batch
    layer = attention_work(model, batch) + router_work(model, batch) + expert_work(model, batch)
    # Rows of inputs and of outputs, of matmuls that read each once: bytes less those of the weights, about half each.
    moved = sum(each.num_bytes for each in layer.forward.matmuls if each.kind != "attention") / batch.element_bytes
    weights = sum(each.flops for each in layer.forward.matmuls if each.kind == "dense") / (2 * batch.tokens)
    weights += 3 * batch.num_local_experts * model.hidden * model.moe.ffn_hidden
    seconds = (moved - weights) / 2 / simulation.hardware.memory_bytes_per_s
    return 3 * seconds, (2 + 4) * seconds


def with_quantising(simulation: Simulation, step: Simulated) -> Simulated:
    """The step with the memory traffic that fp8 adds."""
    model, schedule = simulation.config.model, simulation.schedule
    seconds = sum(fp8_layer(simulation)) * (model.num_layers + model.num_mtp_layers) * simulation.num_micro
    return replace(step, parts=dict(step.parts) | {"fp8": seconds / schedule.stages / (1 - schedule.bubble)})


def deepseek_v3(*, mtp: int) -> ModelConfig:
    """The model of DeepSeek-V3, with sequences of 4096 tokens. mtp: layers of multi-token prediction."""
    settings = Settings(read_json(DEEPSEEK_V3), str(DEEPSEEK_V3))
    return replace(family_of(settings).read_config(settings), max_seq_len=4096, num_mtp_layers=mtp)


def subject(model: ModelConfig, ranks: int, ep_size: int, batch: int, micro: int, **parallel: str) -> Subject:
    """The subject of a simulation: the ranks of one pipeline stage, 8 on each node."""
    config = TrainConfig(
        run=RunConfig(global_batch_size=batch, micro_batch_size=micro, dtype="bfloat16"),
        model=model,
        parallel=ParallelConfig(ep_size=ep_size, **parallel),  # type: ignore[arg-type] # it checks them itself
        cluster=ClusterConfig(num_workers=ranks),
    )
    return Subject("public", config, 8, ())
