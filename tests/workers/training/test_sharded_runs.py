"""Runs with sharded states: interrupted, resumed, moved to other layouts, and read back from the ranks' memory."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.checkpoints.checkpoint_files import checkpoint_path
from workers.distributed.parallel import ParallelConfig
from workers.training.training_run import TrainingRun

STEPS, CUT, KEPT = 4, 3, 2  # the last step in memory before the run is cut
SHARDED = ParallelConfig(shard="full", ep_size=2)
REPLICATED = ParallelConfig(shard="full", ep_size=1, replicate=2)
ELSEWHERE = {
    2: [ParallelConfig(), ParallelConfig(shard="full", ep_size=1)],
    4: [ParallelConfig(shard="optimizer", ep_size=1), ParallelConfig(shard="full"), REPLICATED],
}


def _train(spec, name, rank, world_size, *, stop_after=None, resume_from=None):
    spec = replace(spec, run_dir=spec.run_dir.parent / name)
    gang = f"{name}-{resume_from}".replace("/", "-")
    worker = join_worker(spec, rank, world_size, gang, float64=True, stop_after=stop_after)
    worker.train(resume_from)
    return worker


def _interrupt_and_resume(rank, world_size, spec):
    """The states of an uninterrupted run, of one that is cut, and of that when it has gone on."""
    states = [whole_state(_train(spec, "whole", rank, world_size))]
    cut = _train(spec, "cut", rank, world_size, stop_after=CUT)
    states.append(whole_state(cut))
    cut.write_held(KEPT)
    path = checkpoint_path(cut._spec.run_dir / "checkpoints", CUT)
    states.append(whole_state(_train(spec, "cut", rank, world_size, resume_from=path)))
    return states


def _resume_elsewhere(rank, world_size, spec):
    """By layout and step that is loaded: the state then, and after the last step."""
    found = {}
    for index, parallel in enumerate(ELSEWHERE[world_size]):
        for step in (KEPT, CUT):
            worker = join_worker(replace(spec, parallel=parallel), rank, world_size, f"{index}-{step}", float64=True)
            with worker._state.open_control() as control:
                run = TrainingRun(worker._state, control, publish=print, stop_requested=worker._stop_requested)
                run.load(checkpoint_path(spec.run_dir.parent / "cut" / "checkpoints", step))
                loaded = whole_state(worker)
                for later in range(step + 1, STEPS + 1):
                    run.trainer.step(later)
            found[str(parallel), world_size, step] = loaded, whole_state(worker)
    return found if rank == 0 else None


def _differing(state, expected):
    assert state.keys() == expected.keys()
    return [key for key in expected if not torch.equal(state[key], expected[key])]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "parallel"), [("adamw", SHARDED), ("muon", SHARDED), ("adamw", REPLICATED)])
def test_a_sharded_run_resumes_bit_for_bit_and_in_any_other_layout(tmp_path, optimizer, parallel):
    settings = {"eval_every": 0, "memory_checkpoint_every": 1, "keep_checkpoints": 9}
    spec = replace(make_spec(tmp_path, steps=STEPS, **settings), parallel=parallel)
    spec = replace(spec, optim=replace(spec.optim, name=optimizer))
    whole, cut, resumed = run_ranks(4, _interrupt_and_resume, spec)[0]
    assert _differing(resumed, whole) == []
    assert _differing(cut, whole) != []
    for world_size in ELSEWHERE:
        found = run_ranks(world_size, _resume_elsewhere, spec)[0]
        for (layout, _, step), (loaded, last) in found.items():
            assert step == KEPT or _differing(loaded, cut) == [], layout
            for key, expected in whole.items():
                atol = 1e-10 * expected.abs().max().item() if expected.ndim else 0
                torch.testing.assert_close(
                    last[key], expected, rtol=1e-10, atol=atol, msg=lambda m, n=(layout, step, key): f"{n}: {m}"
                )


class _Casts(TorchDispatchMode):
    """Counts tensors that become bfloat16."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.number += func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        return func(*args, **kwargs)


def _casts(rank, world_size, spec):
    """Of two forwards under one context, as in generation."""
    state, found = join_worker(spec, rank, world_size, "casts")._state, []
    with torch.no_grad(), state.autocast():
        for _ in range(2):
            with _Casts() as casts:
                state.model(torch.zeros(1, 8, dtype=torch.int64))
            found.append(casts.number)
    return found


@pytest.mark.parametrize(("shard", "keeps"), [("none", True), ("full", False)])
def test_only_whole_weights_leave_copies_in_bfloat16_between_forwards(tmp_path, shard, keeps):
    spec = make_spec(tmp_path, dtype="bfloat16")
    for first, second in run_ranks(2, _casts, replace(spec, parallel=ParallelConfig(shard=shard))):
        assert first > 0
        assert (second < first) == keeps
