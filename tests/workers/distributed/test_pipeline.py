"""How layers and ranks are divided into the stages of a pipeline."""

import pytest

from dispatch.errors import InvalidValue
from workers.distributed.parallel import ParallelConfig
from workers.distributed.pipeline import SPLIT_BACKWARD, PipelineConfig, divide_layers


def test_layers_are_divided_evenly_and_the_first_stages_take_what_is_left():
    assert divide_layers(8, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert divide_layers(7, 3) == [range(3), range(3, 5), range(5, 7)]
    with pytest.raises(InvalidValue, match=r"model.num_layers \(3\) must be at least .* stages \(4\)"):
        divide_layers(3, 4)


def test_interleaved_ranks_take_stages_in_turn():
    pipeline = PipelineConfig(size=2, schedule="interleaved_1f1b", stages_per_rank=3)
    assert pipeline.num_stages == 6
    assert [*pipeline.stages_of(1)] == [1, 3, 5]
    assert pipeline.layers_of(1, 12) == [range(2, 4), range(6, 8), range(10, 12)]
    assert PipelineConfig(size=4).layers_of(3, 5) == [range(4, 5)]  # '1f1b' has one, whatever stages_per_rank is


def test_expert_parallel_groups_lie_inside_a_stage():
    parallel = ParallelConfig(pipeline=PipelineConfig(size=2))
    assert (parallel.resolve(8), parallel.ep_size_of(4)) == (4, 2)
    with pytest.raises(InvalidValue, match=r"ep_size \(4\) must divide .* of a pipeline stage \(2\); use"):
        ParallelConfig(ep_size=4, pipeline=PipelineConfig(size=2)).resolve(4)
    with pytest.raises(InvalidValue, match=r"pipeline.size \(3\) must divide .* \(4\); use one of \[1, 2, 4\]"):
        ParallelConfig(pipeline=PipelineConfig(size=3)).resolve(4)


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD)
def test_schedules_that_split_backward_are_refused_with_the_reason(schedule):
    with pytest.raises(InvalidValue, match=r"computes the gradients of weights apart .* use 1f1b or interleaved_1f1b"):
        PipelineConfig(size=2, schedule=schedule)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(InvalidValue, match=r"parallel.pipeline.size \(0\) must be at least 1"):
        PipelineConfig(size=0)
    with pytest.raises(InvalidValue, match=r"schedule is 'gpipe'; it must be one of 1f1b, interleaved_1f1b"):
        PipelineConfig(size=2, schedule="gpipe")
    with pytest.raises(InvalidValue, match=r"stages_per_rank \(1\) must be at least 2"):
        PipelineConfig(size=2, stages_per_rank=1)


def test_micro_batches_must_fill_the_stages():
    PipelineConfig(size=4).check_micro_batches(7)
    with pytest.raises(InvalidValue, match=r"size \(4\) needs as many micro-batches in a step, .* there are 3"):
        PipelineConfig(size=4).check_micro_batches(3)
    interleaved = PipelineConfig(size=4, schedule="interleaved_1f1b")
    interleaved.check_micro_batches(10)
    with pytest.raises(InvalidValue, match=r"divides the 9 micro-batches of a step into 2 equal rounds"):
        interleaved.check_micro_batches(9)
    PipelineConfig().check_micro_batches(1)
