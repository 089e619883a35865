"""Training on sequences that ranks share: the same as one process, for any layout, interrupted and resumed too."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.workers.training.test_fine_tuning import chat_data
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.checkpoints.checkpoint_files import checkpoint_path
from workers.data.prepare import prepare_dataset
from workers.distributed.parallel import ParallelConfig
from workers.training.evaluation import evaluate
from workers.training.training_run import TrainingRun

# 13 tokens are shared as 7 and 6, as 5, 5 and 3, and as 4, 4, 4 and 1.
SEQ_LEN, STEPS, CUT = 13, 5, 3
COMPARED = 3  # steps: the last one has moments and a bias that came of two
ONE = ParallelConfig()
LAYOUTS = [
    (2, ParallelConfig(context=2)),
    (2, ParallelConfig(context=2, ep_size=1)),
    (3, ParallelConfig(context=3, ep_size=1, shard="full")),
    (4, ParallelConfig(context=2, ep_size=2, expert_copies=2, copies_every=1)),
    (4, ParallelConfig(context=4, ep_size=2, shard="optimizer")),
]
KINDS = {
    "packed": {"query_key_norm": "head", "recompute": "attention"},
    "packed, windows and sinks": {"sliding_window": 4, "full_attention_every": 2, "attention_sinks": True},
    "multi-token prediction": {"num_mtp_layers": 1, "recompute": "full"},
}


def _spec(folder, kind):
    spec = make_spec(folder, micro_batch_size=2, global_batch_size=8)
    spec = replace(spec, model=replace(spec.model, max_seq_len=SEQ_LEN, **KINDS[kind]))
    return replace(spec, data_dir=prepare_dataset(chat_data(folder)).path) if kind.startswith("packed") else spec


def _steps(rank, world_size, spec):
    """Losses, norms and loads of all steps, the evaluation after them, and the state."""
    worker = join_worker(spec, rank, world_size, str(hash(str(spec.parallel))), float64=True)
    state = worker._state
    with state.open_control() as control:
        run = TrainingRun(state, control, publish=print, stop_requested=worker._stop_requested)
        results = [run.trainer.step(step) for step in range(1, COMPARED + 1)]
    assert any(each.placed for each in results) == (spec.parallel.expert_copies > 0)
    options = {"batch_size": 2, "num_sequences": None, "autocast": contextlib.nullcontext()}
    measured = evaluate(state.model, state.dataset, state.sampler, state.groups, **options)
    numbers = [(each.summed["loss"], each.grad_norm) for each in results]
    loads = torch.stack([each.control.load_N for each in results])
    return [*numbers, (measured.val_loss, measured.num_tokens)], loads, measured.load_SN, whole_state(worker)


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        pytest.param("packed", LAYOUTS[1:4], id="packed"),
        pytest.param("multi-token prediction", LAYOUTS[:1], id="multi-token prediction"),
        *(pytest.param(kind, LAYOUTS, id=f"{kind}, all layouts", marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_ranks_that_share_sequences_learn_what_one_process_learns(tmp_path, kind, layouts):
    spec = _spec(tmp_path, kind)
    numbers, loads, held_out, expected = run_ranks(1, _steps, spec)[0]
    for world_size, parallel in layouts:
        found, other_loads, other_held_out, state = run_ranks(world_size, _steps, replace(spec, parallel=parallel))[0]
        assert found == [pytest.approx(pair, rel=1e-10) for pair in numbers]
        assert torch.equal(other_loads, loads)
        assert torch.equal(other_held_out, held_out)
        _expect_close(state, expected, parallel)


def _expect_close(state, expected, what):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = 1e-10 * tensor.abs().max().item() if tensor.ndim else 0
        torch.testing.assert_close(state[name], tensor, rtol=1e-10, atol=atol, msg=lambda m, n=name: f"{what} {n}: {m}")


def _train(spec, name, rank, world_size, *, stop_after=None, resume_from=None):
    spec = replace(spec, run_dir=spec.run_dir.parent / name)
    gang = f"{name}-{resume_from is None}-{stop_after}"
    worker = join_worker(spec, rank, world_size, gang, float64=True, stop_after=stop_after)
    worker.train(resume_from)
    return whole_state(worker)


def _interrupt_and_resume(rank, world_size, spec):
    """The states of an uninterrupted run, and of one that is cut and goes on."""
    whole = _train(spec, "whole", rank, world_size)
    _train(spec, "cut", rank, world_size, stop_after=CUT)
    path = checkpoint_path(spec.run_dir.parent / "cut" / "checkpoints", CUT)
    dist.barrier()
    return whole, _train(spec, "cut", rank, world_size, resume_from=path)


def _go_on(rank, world_size, spec):
    """The state after the last step of another layout that has loaded the cut run."""
    worker = join_worker(spec, rank, world_size, f"elsewhere-{world_size}", float64=True)
    with worker._state.open_control() as control:
        run = TrainingRun(worker._state, control, publish=print, stop_requested=worker._stop_requested)
        run.load(checkpoint_path(spec.run_dir.parent / "cut" / "checkpoints", CUT))
        for step in range(CUT + 1, STEPS + 1):
            run.trainer.step(step)
    return whole_state(worker)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_with_other_shares(tmp_path):
    spec = replace(_spec(tmp_path, "packed"), parallel=ParallelConfig(context=2, ep_size=1))
    whole, resumed = run_ranks(2, _interrupt_and_resume, spec)[0]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    for world_size, parallel in ((1, ONE), (4, ParallelConfig(context=2, ep_size=2))):
        state = run_ranks(world_size, _go_on, replace(spec, parallel=parallel))[0]
        _expect_close(state, whole, parallel)
