"""What the simulation does not know is refused or said."""

from dataclasses import replace

import pytest

from cluster.config import ClusterConfig
from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.errors import InvalidValue
from runtime.commands.plan.simulate.scope import check_scope, left_out
from runtime.settings.config import TrainConfig
from workers.distributed.parallel import ParallelConfig
from workers.distributed.pipeline import PipelineConfig
from workers.model.lora import LoraConfig
from workers.model.model_config import ModelConfig

MODEL = ModelConfig(hidden=32, num_layers=4, num_heads=2, num_kv_heads=2, moe=MoEConfig(num_experts=8, top_k=2))
CONFIG = TrainConfig(model=MODEL, cluster=ClusterConfig(num_workers=8))


@pytest.mark.parametrize(
    ("parallel", "setting"),
    [
        (ParallelConfig(context=2), r"parallel.context \(2\)"),
        (ParallelConfig(pipeline=PipelineConfig(size=2)), r"parallel.pipeline.size \(2\)"),
        (ParallelConfig(expert_copies=1), r"parallel.expert_copies \(1\)"),
    ],
)
def test_settings_that_change_the_answer_are_refused(parallel: ParallelConfig, setting: str) -> None:
    with pytest.raises(InvalidValue, match=f"{setting}: .* not timed; simulate with .*, or plan without --simulate"):
        check_scope(replace(CONFIG, parallel=parallel))


def test_settings_that_the_simulation_knows_are_neither_refused_nor_noted() -> None:
    known = replace(CONFIG, parallel=ParallelConfig(shard="full", replicate=2, payload="fp8", ep_size=2))
    known = replace(known, model=replace(MODEL, recompute="full"))
    check_scope(known)
    assert left_out(known) == ()


def test_a_setting_whose_time_is_left_out_is_said() -> None:
    models = [replace(MODEL, sliding_window=8), replace(MODEL, lora=LoraConfig(rank=2))]
    parallel = ParallelConfig(schedule=ScheduleConfig(num_chunks=2))
    configs = [replace(CONFIG, model=model) for model in models] + [replace(CONFIG, parallel=parallel)]
    assert [[note.split(":")[0] for note in left_out(config)] for config in configs] == [
        ["model.sliding_window"],
        ["model.lora"],
        ["parallel.schedule"],
    ]
