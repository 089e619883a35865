"""The plan of a pipeline is that of the rank which needs most, and its states are those that ranks hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sharding import RingBytes
from cluster.config import ClusterConfig
from dispatch.config import MoEConfig
from runtime.cli import main
from runtime.commands.plan.plan import plan_of_stage
from runtime.commands.plan.stages import stages_of
from runtime.commands.plan.subject import Subject
from runtime.settings.config import RunConfig, TrainConfig
from runtime.settings.size import count_parameters
from runtime.settings.states import state_bytes, training_bytes
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.distributed.parallel import ParallelConfig
from workers.distributed.pipeline import PipelineConfig
from workers.distributed.sharded import local_rows
from workers.model.model_config import ModelConfig
from workers.training.worker_spec import WorkerSpec

MODEL = ModelConfig(
    hidden=64,
    num_layers=6,
    num_heads=2,
    num_kv_heads=1,
    dense_ffn_hidden=96,
    max_seq_len=16,
    vocab_size=260,  # divides into rows of ranks
    moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=32),
)
LAYOUTS = {
    "1f1b": (2, ParallelConfig(pipeline=PipelineConfig(size=2))),
    "interleaved": (2, ParallelConfig(pipeline=PipelineConfig(size=2, schedule="interleaved_1f1b"))),
    "multi-token": (2, ParallelConfig(pipeline=PipelineConfig(size=2))),
    "uneven": (4, ParallelConfig(pipeline=PipelineConfig(size=4))),
    "optimizer": (4, ParallelConfig(ep_size=1, shard="optimizer", pipeline=PipelineConfig(size=2))),
    "full": (4, ParallelConfig(ep_size=1, shard="full", pipeline=PipelineConfig(size=2))),
    "full interleaved": (
        4,
        ParallelConfig(ep_size=1, shard="full", pipeline=PipelineConfig(size=2, schedule="interleaved_1f1b")),
    ),
}
MODELS = {"multi-token": replace(MODEL, num_mtp_layers=1)}  # the others are of MODEL
NORM_BYTES = 8 * 4  # of the gradient, in float64


def measure(rank: int, world_size: int, spec: WorkerSpec) -> tuple[dict[str, int], set[tuple[int, ...]], int]:
    """Bytes of this rank after a step, the forwards by stage that waited for their backward, and gradients sent."""
    state = join_worker(spec, rank, world_size, spec.run_dir.name)._state
    assert state.pipeline is not None
    waiting = set()
    for stage in state.pipeline._stages:
        backward = stage.backward_one_chunk

        def count(*args: Any, backward: Any = backward, **kwargs: Any) -> None:
            waiting.add(tuple(len(each.fwd_cache) for each in state.pipeline._stages))  # type: ignore[union-attr]
            backward(*args, **kwargs)

        stage.backward_one_chunk = count  # type: ignore[method-assign]
    with state.open_control() as control, RingBytes() as counted:
        state.trainer(control).step(1)
    weights = [local_rows(parameter)[0] for parameter in state.model.parameters()]
    moments = [
        local_rows(moment)[0] for each in state.optimizer.state.values() for moment in each.values() if moment.ndim
    ]
    held = {"weights": sum(p.nbytes for p in weights), "AdamW moments": sum(m.nbytes for m in moments)}
    return held, waiting, counted.by_group_size.total()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_and_sends_what_the_plan_says(tmp_path: Path, name: str) -> None:
    (world_size, parallel), model = LAYOUTS[name], MODELS.get(name, MODEL)
    of_stage = world_size // parallel.pipeline.size
    run = RunConfig(global_batch_size=8 * of_stage, micro_batch_size=1)
    spec = replace(make_spec(tmp_path), run_dir=tmp_path / name, model=model, parallel=parallel)
    spec = replace(spec, run=replace(spec.run, global_batch_size=8 * of_stage, micro_batch_size=1))
    config = TrainConfig(model=model, run=run, parallel=parallel, cluster=ClusterConfig(num_workers=world_size))
    # The first rank of each stage, which has most rows where they are shared out.
    found = run_ranks(world_size, measure, spec)[::of_stage]
    for (measured, waiting, sent), stage in zip(found, stages_of(config), strict=True):
        counts = count_parameters(model, layers=stage.layers)
        planned = state_bytes(stage.alone, counts, counts)
        assert measured == {kind: sum(planned[kind]) for kind in measured}
        assert max(map(sum, waiting)) == stage.in_flight
        assert _most(waiting) == _most(parallel.pipeline.in_flight(stage.pp_rank, config.num_micro_batches))
        gradients = plan_of_stage(Subject(name, config, world_size, ()), stage).gradients
        assert sent == pytest.approx(sum(gradients.values()), abs=NORM_BYTES)
    if parallel.shard == "none":
        most_bytes = max(measured["weights"] + measured["AdamW moments"] for measured, *_ in found)
        assert training_bytes(config) == most_bytes * 4 / 3  # and gradients, as many bytes as the weights


def _most(forwards: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    return {each for each in forwards if sum(each) == max(map(sum, forwards))}


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "small", "--batch", "16", "--micro-batch", "1", *arguments, "--json"]) == 0
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
        "message_bytes": 4 * 8 * 256 * 192,  # a rank's share of the batch, once as activations
    }
    assert two["parameters"] == whole["parameters"]
    assert two["activation_bytes"]["head and loss"] == 0
    # One MoE layer of three, with half of its experts; two micro-batches at once.
    alone = plan_of(capsys, "--world", "2", "--ep", "2")
    assert two["parameters_of_rank"]["experts"] * 3 == alone["parameters_of_rank"]["experts"]
    kept, of_one = (plan["activation_bytes"]["routed experts"] for plan in (two, alone))
    assert kept == pytest.approx(2 / 3 * of_one)
    assert main(["plan", "small", "--world", "4", "--pp", "2", "--batch", "16", "--micro-batch", "1"]) == 0
    text = capsys.readouterr().out
    assert "Pipeline of 2: of rank 0 in it, that needs most, with layers 0 to 1 and 2 forwards under way" in text
    assert "activations and their gradients, to other stages" in text


def test_a_search_for_settings_knows_no_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "small", "--world", "4", "--pp", "2", "--batch", "16", "--micro-batch", "1", "--fit"]
    assert main(arguments) == 2
    assert "--fit knows no pipeline, but parallel.pipeline.size is 2; leave out --fit" in capsys.readouterr().err
