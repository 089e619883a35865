"""The plan against a step of the real trainer: what its allocator hands out at most."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from cluster.config import ClusterConfig
from runtime.commands.bench.dispatch.memory import peak_allocated_bytes
from runtime.commands.plan.activations import MicroBatch, peak_bytes, saved_bytes, scratch_bytes
from runtime.commands.plan.stages import MESSAGES, PlanStage, stages_of
from runtime.settings.config import TrainConfig
from runtime.settings.size import count_parameters
from runtime.settings.states import GATHERED, stage_config, state_bytes
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.distributed.parallel import ParallelConfig, Shard
from workers.distributed.pipeline import PipelineConfig, PipelineSchedule
from workers.model.attention import LatentConfig
from workers.model.model_config import ModelConfig
from workers.training.worker_spec import WorkerSpec

Dtype = Literal["float32", "bfloat16"]


def peak_of_later_steps(rank: int, world_size: int, spec: WorkerSpec, name: str = "peak") -> int:
    """Above weights and moments, which the first step has made: the least of three steps.

    What a thread of gloo frees last the profiler does not see, and counts on.
    """
    state = join_worker(spec, rank, world_size, name)._state
    control = state.open_control()
    trainer = state.trainer(control)
    trainer.step(1)
    try:
        return min(peak_allocated_bytes(lambda step=step: trainer.step(step)) for step in (2, 3, 4))
    finally:
        control.close()


def test_a_step_of_the_trainer_holds_what_the_plan_says(tmp_path: Path) -> None:
    # A vocabulary so large that logits which live on during backward would be a sixth of it all.
    spec = make_spec(tmp_path, micro_batch_size=6)
    config = replace(spec.model, hidden=64, vocab_size=2000)
    (measured,) = run_ranks(1, peak_of_later_steps, replace(spec, model=config))
    counts = count_parameters(config)
    planned = activation_peak(config, 6) + 4 * (counts.dense + counts.experts)
    assert 0.9 * planned < measured < 1.02 * planned


def activation_peak(config: ModelConfig, num_sequences: int) -> float:
    """Of a micro-batch on a rank with all experts."""
    batch = micro_batch(config, num_sequences)
    return peak_bytes(saved_bytes(config, batch, count_parameters(config).cast), scratch_bytes(config, batch))


def micro_batch(config: ModelConfig, num_sequences: int) -> MicroBatch:
    """On a CPU, where nothing is exchanged."""
    tokens = num_sequences * config.max_seq_len
    return MicroBatch(
        tokens=tokens,
        seq_len=config.max_seq_len,
        num_local_experts=config.moe.num_experts,
        expert_rows=tokens * config.moe.top_k,
        arrived_rows=tokens,
        ids_per_row=config.moe.top_k,
        element_bytes=4,
        experts="grouped",
        exchanges=False,
    )


# Attention that is much wider than the experts, and made again in backward.
WIDE: dict[str, dict[str, Any]] = {
    "plain": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 32},
    "grouped": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32},
    "normalised": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "query_key_norm": "head"},
    "window": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 32, "sliding_window": 24},
    "latent": {
        "num_heads": 8,
        "attention": "latent",
        "latent": LatentConfig(query_rank=20, kv_rank=18, nope_dim=10, rope_dim=6, value_dim=16),
    },
}
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


@pytest.mark.parametrize("context", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_wide_attention_holds_at_most_what_the_plan_says(tmp_path: Path, context: int) -> None:
    base = make_spec(tmp_path, global_batch_size=2)
    moe = replace(base.model.moe, ffn_hidden=8, num_experts=2, top_k=1)
    small = replace(base.model, hidden=32, dense_ffn_hidden=8, max_seq_len=128, recompute="full", moe=moe)
    specs, planned = [], []
    for wide, dtype in product(WIDE.values(), DTYPES):
        model, parallel = replace(small, **wide), ParallelConfig(context=context, ep_size=1)
        specs.append(replace(base, model=model, run=replace(base.run, dtype=dtype), parallel=parallel))
        counts, batch = count_parameters(model), shared_batch(micro_batch(model, 2), context, dtype)
        activations = peak_bytes(saved_bytes(model, batch, counts.cast), scratch_bytes(model, batch))
        planned.append(activations + 4 * (counts.dense + counts.experts))
    by_rank = run_ranks(context, peaks_of_later_steps, specs)
    for case, measured, plan in zip(product(WIDE, DTYPES), zip(*by_rank, strict=True), planned, strict=True):
        assert 0.5 * plan < max(measured) < 1.02 * plan, (case, max(measured) / plan)


def shared_batch(batch: MicroBatch, context: int, dtype: Dtype) -> MicroBatch:
    """What each of the ranks that share its sequences computes, in this dtype."""
    rows, size = batch.expert_rows / context, 2 if dtype == "bfloat16" else 4
    tokens = batch.tokens // context
    return replace(batch, tokens=tokens, arrived_rows=tokens, expert_rows=rows, context=context, element_bytes=size)


def peaks_of_later_steps(rank: int, world_size: int, specs: list[WorkerSpec]) -> list[int]:
    return [peak_of_later_steps(rank, world_size, spec, str(index)) for index, spec in enumerate(specs)]


# Sharding, replicas and micro-batches.
SHARDED: tuple[tuple[Shard, int, int], ...] = (
    ("optimizer", 1, 1),
    ("optimizer", 1, 2),
    ("full", 1, 1),
    ("full", 1, 2),
    ("full", 2, 1),
)


def test_a_sharded_step_holds_at_most_what_the_plan_says(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    model = replace(spec.model, hidden=64, vocab_size=600, moe=replace(spec.model.moe, ffn_hidden=64))
    specs, planned = [], []
    for shard, num_replicas, num_micro in SHARDED:
        run = replace(spec.run, global_batch_size=8 * num_micro, micro_batch_size=2)
        parallel = ParallelConfig(shard=shard, ep_size=1, replicate=num_replicas)
        config = TrainConfig(run=run, model=model, parallel=parallel, cluster=ClusterConfig(num_workers=4))
        specs.append(replace(spec, run=run, model=model, parallel=parallel))
        states = state_bytes(config, count_parameters(model))
        held = {name: sum(states[name]) for name in ("gradients", GATHERED)}
        planned.append({"activations": activation_peak(model, 2), **held})
    by_rank = run_ranks(4, peaks_of_later_steps, specs)
    for case, measured, plan in zip(SHARDED, zip(*by_rank, strict=True), planned, strict=True):
        assert 0.5 * sum(plan.values()) < max(measured) < 1.02 * sum(plan.values()), (case, measured, plan)


def stage_peak(stage: PlanStage, num_sequences: int) -> float:
    """Above weights and moments, and torch's buffers for messages, which all are there from the first step on."""
    alone, counts = stage.alone, count_parameters(stage.config.model, layers=stage.layers)
    batch = micro_batch(alone.model, num_sequences)
    by_stage = []
    for layers in stage.layers:
        model = stage_config(stage.config, (layers,)).model
        by_stage.append(saved_bytes(model, batch, count_parameters(stage.config.model, layers=(layers,)).cast))
    saved = stage.saved(by_stage) | {MESSAGES: stage.input_gradient_bytes}
    states = state_bytes(alone, counts, counts)
    held = sum(sum(states.get(name, ())) for name in ("gradients", GATHERED))
    return held + peak_bytes(saved, stage.scratch(scratch_bytes(alone.model, batch)))


@pytest.mark.slow
def test_a_rank_of_a_pipeline_holds_at_most_what_the_plan_says(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    moe = replace(spec.model.moe, ffn_hidden=64)
    model = replace(spec.model, hidden=64, vocab_size=600, num_layers=6, moe=moe)
    run = replace(spec.run, global_batch_size=16, micro_batch_size=2)
    specs, configs = [], []
    for shard, schedule in product(get_args(Shard), get_args(PipelineSchedule)):
        parallel = ParallelConfig(shard=shard, ep_size=1, pipeline=PipelineConfig(size=2, schedule=schedule))
        specs.append(replace(spec, run=run, model=model, parallel=parallel))
        configs.append(TrainConfig(run=run, model=model, parallel=parallel, cluster=ClusterConfig(num_workers=4)))
    by_rank = run_ranks(4, peaks_of_later_steps, specs)
    for config, measured in zip(configs, zip(*by_rank, strict=True), strict=True):
        for stage, peaks in zip(stages_of(config), (measured[:2], measured[2:]), strict=True):
            planned = stage_peak(stage, 2)
            case = config.parallel.shard, config.parallel.pipeline.schedule, stage.pp_rank
            assert 0.5 * planned < max(peaks) < 1.02 * planned, (case, max(peaks) / planned)
