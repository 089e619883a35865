"""The plan of a pipeline is that of the rank which needs most, and its states are those that ranks hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from dispatch.config import MoEConfig
from runtime.cli import main
from runtime.commands.plan.stages import stages_of
from runtime.settings.config import RunConfig, TrainConfig
from runtime.settings.size import count_parameters
from runtime.settings.states import state_bytes, training_bytes
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.gang.parallel import ParallelConfig
from workers.gang.pipeline import PipelineConfig
from workers.model.model_config import ModelConfig
from workers.training.worker_spec import WorkerSpec

MODEL = ModelConfig(
    hidden=64,
    num_layers=6,
    num_heads=2,
    num_kv_heads=1,
    dense_ffn_hidden=96,
    max_seq_len=16,
    moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=32),
)
PIPELINES = {
    "1f1b": PipelineConfig(size=2),
    "interleaved": PipelineConfig(size=2, schedule="interleaved_1f1b"),
    "uneven": PipelineConfig(size=4),
}


def measure(rank: int, world_size: int, spec: WorkerSpec) -> tuple[dict[str, int], int]:
    """Bytes of this rank after a step, and the most forwards that waited for their backward."""
    worker = join_worker(spec, rank, world_size, spec.run_dir.name)
    state = worker._state
    assert state.pipeline is not None
    most = [0]
    for stage in state.pipeline._stages:
        backward = stage.backward_one_chunk

        def count(*args: Any, backward: Any = backward, **kwargs: Any) -> None:
            most[0] = max(most[0], sum(len(each.fwd_cache) for each in state.pipeline._stages))  # type: ignore[union-attr]
            backward(*args, **kwargs)

        stage.backward_one_chunk = count  # type: ignore[method-assign]
    worker.train()
    parameters = list(state.model.parameters())
    moments = [moment for each in state.optimizer.state.values() for moment in each.values() if moment.ndim]
    return {"weights": sum(p.nbytes for p in parameters), "AdamW moments": sum(m.nbytes for m in moments)}, most[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_rank_holds_the_states_and_the_micro_batches_of_the_plan(tmp_path: Path, name: str) -> None:
    pipeline = PIPELINES[name]
    spec = make_spec(tmp_path, steps=1, micro_batch_size=1, memory_checkpoint_every=0)
    parallel = ParallelConfig(pipeline=pipeline)
    spec = replace(spec, run_dir=tmp_path / name, model=MODEL, parallel=parallel)
    config = TrainConfig(
        model=MODEL,
        run=RunConfig(global_batch_size=12, micro_batch_size=1),
        parallel=parallel,
        cluster=ClusterConfig(num_workers=pipeline.size),
    )
    found = run_ranks(pipeline.size, measure, spec)
    for (measured, most), stage in zip(found, stages_of(config), strict=True):
        counts = count_parameters(MODEL, layers=stage.layers)
        planned = state_bytes(stage.alone, counts, counts)
        assert measured == {kind: sum(planned[kind]) for kind in measured}
        assert most == stage.in_flight
    most_bytes = max(measured["weights"] + measured["AdamW moments"] for measured, _ in found)
    assert training_bytes(config) == most_bytes * 4 / 3  # and gradients, as many bytes as the weights


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "small", "--batch", "32", "--micro-batch", "1", *arguments, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_the_plan_is_of_the_rank_that_needs_most(capsys: pytest.CaptureFixture[str]) -> None:
    whole, two = plan_of(capsys, "--world", "4"), plan_of(capsys, "--world", "4", "--pp", "2", "--ep", "2")
    assert whole["pipeline"] is None
    assert two["pipeline"] == {
        "size": 2,
        "rank": 0,
        "layers": [[0, 1]],
        "in_flight": 2,
        "message_bytes": 4 * 16 * 256 * 192,  # a rank's share of the batch, once as activations
    }
    assert two["parameters"] == whole["parameters"]
    assert two["activation_bytes"]["head and loss"] == 0
    # One MoE layer of three, with half of its experts; two micro-batches at once.
    alone = plan_of(capsys, "--world", "2", "--ep", "2")
    assert two["parameters_of_rank"]["experts"] * 3 == alone["parameters_of_rank"]["experts"]
    kept, of_one = (plan["activation_bytes"]["routed experts"] for plan in (two, alone))
    assert kept == pytest.approx(2 / 3 * of_one)
    assert main(["plan", "small", "--world", "4", "--pp", "2", "--batch", "32", "--micro-batch", "1"]) == 0
    text = capsys.readouterr().out
    assert "Pipeline of 2: of rank 0 in it, that needs most, with layers 0 to 1 and 2 forwards under way" in text
    assert "activations and their gradients, to other stages" in text


def test_a_search_for_settings_knows_no_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "small", "--world", "4", "--pp", "2", "--batch", "32", "--micro-batch", "1", "--fit"]
    assert main(arguments) == 2
    assert "--fit knows no pipeline, but parallel.pipeline.size is 2; leave out --fit" in capsys.readouterr().err
