"""Pipeline parallelism: how layers are divided into stages, and the groups of ranks that this makes."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch.distributed as dist

from dispatch.errors import InvalidValue

PipelineSchedule = Literal["1f1b", "interleaved_1f1b"]
# Schedules of torch that compute the gradients of inputs and of weights apart.
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv_zero_bubble", "dual_pipe_v")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Pipeline parallelism: the layers divided over groups of ranks."""

    size: int = 1
    """Groups of neighbouring ranks that each hold a part of the layers (pipeline-parallel size); must divide the number
    of workers. 1: every rank has all layers."""
    schedule: PipelineSchedule = "1f1b"
    """Order of the micro-batches: one forward, one backward ('1f1b'), or the same with several stages on each rank,
    which wastes less time and sends more ('interleaved_1f1b')."""
    stages_per_rank: int = 2
    """Stages on each rank with 'interleaved_1f1b'; '1f1b' has one."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidValue(f"parallel.pipeline.size ({self.size}) must be at least 1; 1 means no pipeline")
        if self.schedule in SPLIT_BACKWARD:
            raise InvalidValue(
                f"parallel.pipeline.schedule {self.schedule!r} computes the gradients of weights apart from those of "
                "inputs, and torch finds no weights inside the autograd functions of the experts and of the loss "
                "(pytorch #166577); use 1f1b or interleaved_1f1b"
            )
        if self.schedule not in get_args(PipelineSchedule):
            raise InvalidValue(
                f"parallel.pipeline.schedule is {self.schedule!r:.60}; it must be one of "
                f"{', '.join(get_args(PipelineSchedule))}"
            )
        if self.stages_per_rank < 2:
            raise InvalidValue(
                f"parallel.pipeline.stages_per_rank ({self.stages_per_rank}) must be at least 2: with one stage a "
                "rank there is nothing to interleave; set --parallel.pipeline.schedule 1f1b"
            )

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.size * (self.stages_per_rank if self.schedule == "interleaved_1f1b" else 1)

    def stages_of(self, pp_rank: int) -> range:
        """The stages of a rank: stages go round-robin over the pipeline ranks."""
        return range(pp_rank, self.num_stages, self.size)

    def layers_of(self, pp_rank: int, num_layers: int) -> list[range]:
        """The layers of each stage of a rank, by their index in the whole model."""
        stages = divide_layers(num_layers, self.num_stages)
        return [stages[stage] for stage in self.stages_of(pp_rank)]

    def ranks_per_stage(self, world_size: int) -> int:
        """Ranks that hold the same layers. Raises InvalidValue where the pipeline does not divide the ranks."""
        if world_size % self.size:
            raise InvalidValue(
                f"parallel.pipeline.size ({self.size}) must divide the number of workers ({world_size}); use one of "
                f"{[size for size in range(1, world_size + 1) if world_size % size == 0]}"
            )
        return world_size // self.size

    def in_flight(self, pp_rank: int, num_micro: int) -> set[tuple[int, ...]]:
        """Which numbers of micro-batches wait for their backward on a rank, each as a tuple by stage of that rank.

        One tuple for every moment after a forward; equal ones count once. `trimtab plan` takes the tuple that needs
        most memory.
        """
        if self.schedule == "1f1b":
            return {(min(num_micro, self.size - pp_rank),)}
        # As torch's ScheduleInterleaved1F1B: a stage takes all `round_size` micro-batches of a round before the next
        # stage of the rank does, and `warm_up` forwards come before the first backward.
        num_local, round_size = self.stages_per_rank, num_micro // max(1, num_micro // self.size)
        num_forwards = num_local * num_micro
        warm_up = min(num_forwards, (num_local - 1) * round_size + 2 * (self.size - 1 - pp_rank))
        held, found = [0] * num_local, set()
        for forward in range(num_forwards):
            held[forward // round_size % num_local] += 1
            found.add(tuple(held))
            if forward >= warm_up:
                held[-1 - (forward - warm_up) // round_size % num_local] -= 1
        return found

    def check_micro_batches(self, num_micro: int) -> None:
        """Raise InvalidValue where the schedule cannot run with so many micro-batches a step."""
        if self.size == 1:
            return
        way_out = "set another --run.micro_batch_size or --run.global_batch_size"
        if num_micro < self.size:
            raise InvalidValue(
                f"parallel.pipeline.size ({self.size}) needs as many micro-batches in a step, or stages would wait for "
                f"nothing; there are {num_micro}; {way_out}"
            )
        if self.schedule == "interleaved_1f1b" and num_micro % (num_micro // self.size):
            raise InvalidValue(
                f"parallel.pipeline.schedule interleaved_1f1b divides the {num_micro} micro-batches of a step into "
                f"{num_micro // self.size} equal rounds of {self.size} or more, which does not come out even; {way_out}"
            )


def divide_layers(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage in order, divided as evenly as can be; the first stages take the layers left over.

    Not the last ones: the last stage also computes the logits.
    """
    if num_layers < num_stages:
        raise InvalidValue(
            f"model.num_layers ({num_layers}) must be at least the number of pipeline stages ({num_stages}); lower "
            "--parallel.pipeline.size or --parallel.pipeline.stages_per_rank"
        )
    share, more = divmod(num_layers, num_stages)
    starts = [stage * share + min(stage, more) for stage in range(num_stages + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


@dataclass(frozen=True)
class PipelineGroups:
    """One rank's place in a pipeline.

    World 8, pipeline 2, EP 2:

        pipeline rank 0: ranks 0 1 2 3, with experts  A B A B  of the first layers
        pipeline rank 1: ranks 4 5 6 7, with experts  A B A B  of the last layers

    rank: the pipeline rank of this rank, from 0 to `size` - 1. group: the ranks at the same place in each row above,
    which pass the same sequences on: 0 and 4, 1 and 5, ... stage_group: the ranks with the same layers, a row above.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    stage_group: dist.ProcessGroup
