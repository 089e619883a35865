"""What a run with pipeline parallelism cannot have yet is refused before anything starts, with the reason."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.config import ClusterConfig
from dispatch.errors import InvalidValue
from runtime.settings.config import RunConfig, TrainConfig, cross_check, feasible_sizes
from workers.distributed.parallel import ParallelConfig
from workers.distributed.pipeline import PipelineConfig
from workers.model.freezing import NAMES
from workers.model.lora import LoraConfig

ALL_BUT_DENSE_FFN = tuple(name for name in NAMES if name != "dense_ffn")


def of_two_stages(**sections: dict[str, Any]) -> TrainConfig:
    base = TrainConfig(
        run=RunConfig(micro_batch_size=2),
        cluster=ClusterConfig(num_workers=4),
        parallel=ParallelConfig(pipeline=PipelineConfig(size=2)),
    )
    return replace(base, **{name: replace(getattr(base, name), **values) for name, values in sections.items()})


def test_stages_with_enough_micro_batches_pass_all_checks() -> None:
    cross_check(of_two_stages())
    cross_check(of_two_stages(parallel={"ep_size": 1, "pipeline": PipelineConfig(size=4)}, run={"micro_batch_size": 1}))
    cross_check(of_two_stages(parallel={"ep_size": 1, "shard": "full"}, optim={"offload": "states"}))
    cross_check(of_two_stages(model={"tie_embeddings": True, "num_mtp_layers": 1}))
    cross_check(of_two_stages(model={"lora": LoraConfig(rank=4)}))
    cross_check(of_two_stages(optim={"freeze": ("router", "embedding")}))
    assert feasible_sizes(of_two_stages()) == (4,)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"cluster": {"num_workers": 3}}, r"pipeline.size \(2\) must divide the number of workers \(3\)"),
        ({"run": {"global_batch_size": 15}}, r"multiple of the workers of a stage \(2 = .* 16 would do"),
        ({"run": {"micro_batch_size": 0}}, r"size \(2\) needs as many micro-batches in a step, .* there are 1"),
        ({"model": {"num_layers": 2, "num_dense_layers": 0}, "parallel": {"pipeline": PipelineConfig(size=4)}}
         | {"run": {"micro_batch_size": 1}}, r"model.num_layers \(2\) must be at least .* \(4\)"),
        ({"model": {"lora": LoraConfig(rank=4, targets=("dense_ffn",))}}, r"nothing to train .* layers 2 to 3; "),
        ({"optim": {"freeze": ALL_BUT_DENSE_FFN}}, r"leave nothing to train in a stage, as in that of layers 2 to 3; "),
        ({"aux": {"loss": "switch"}}, r"auxiliary losses \(aux.\*\) yet: only the last stage has a loss"),
        ({"aux": {"z_alpha": 1e-3}}, r"size \(2\) does not go with auxiliary losses \(aux.\*\) yet"),
        ({"balance": {"record": 1}}, r"balance.record \(1\) yet: a rank scores the layers of its stage alone"),
        ({"run": {"sample_prompts": ("a", "b")}}, r"run.sample_prompts \(2\) yet: a rank has the layers of its stage"),
        ({"parallel": {"exchange": "deep_ep"}}, r"parallel.exchange deep_ep yet: several micro-batches"),
        ({"cluster": {"min_workers": 2}}, r"other numbers of workers than cluster.num_workers yet"),
        ({"cluster": {"max_workers": 8}}, r"leave cluster.min_workers and cluster.max_workers at 0"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_stages_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        cross_check(of_two_stages(**sections))
