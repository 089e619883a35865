"""The plan against a step of the real trainer: what its allocator hands out at most."""

from dataclasses import replace
from pathlib import Path

from runtime.commands.bench.dispatch.memory import peak_allocated_bytes
from runtime.commands.plan.activations import MicroBatch, peak_bytes, saved_bytes, scratch_bytes
from runtime.settings.size import count_parameters
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.training.step import Trainer
from workers.training.worker_spec import WorkerSpec


def peak_of_second_step(rank: int, world_size: int, spec: WorkerSpec) -> int:
    """Above weights and moments, which the first step has made."""
    state = join_worker(spec, rank, world_size, "peak")._state
    control = state.open_control()
    parts = {name: getattr(state, name) for name in ("model", "optimizer", "sampler", "groups", "meter")}
    trainer = Trainer(**parts, control=control, run=spec.run, optim=spec.optim, aux=spec.aux)
    trainer.step(1)
    try:
        return peak_allocated_bytes(lambda: trainer.step(2))
    finally:
        control.close()


def test_a_step_of_the_trainer_holds_what_the_plan_says(tmp_path: Path) -> None:
    # A vocabulary so large that logits which live on during backward would be a sixth of it all.
    spec = make_spec(tmp_path, micro_batch_size=6)
    config = replace(spec.model, hidden=64, vocab_size=2000)
    (measured,) = run_ranks(1, peak_of_second_step, replace(spec, model=config))
    counts, tokens = count_parameters(config), 6 * config.max_seq_len
    batch = MicroBatch(
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
    saved, scratch = saved_bytes(config, batch, counts.cast), scratch_bytes(config, batch)
    planned = peak_bytes(saved, scratch) + 4 * (counts.dense + counts.experts)
    assert 0.9 * planned < measured < 1.02 * planned
