"""A run with copies of hot experts is the run without: the same weights, moments, counts, biases and checkpoints."""

from dataclasses import replace

import numpy as np
import pytest

from dispatch.errors import InvalidValue
from dispatch.exchange.registry import BACKENDS
from tests.ranks import run_ranks
from tests.workers.training_gang import assert_same_state, join_worker, make_spec, whole_state
from workers.checkpoints.checkpoint_files import latest
from workers.distributed.parallel import ParallelConfig
from workers.distributed.pipeline import PipelineConfig
from workers.model.lora import LoraConfig
from workers.record.run_log import read_events, read_load_history

STEPS = 6


def _specs(spec):
    """By name: whole experts, two micro-batches; two EP groups; adapters on experts; state on the host."""
    lora = LoraConfig(rank=2, targets=("attention", "experts"))
    return {
        "micro": replace(spec, run=replace(spec.run, micro_batch_size=1)),
        "ep2": replace(spec, parallel=ParallelConfig(ep_size=2)),
        "adapters": replace(spec, model=replace(spec.model, lora=lora)),
        "offload": replace(spec, optim=replace(spec.optim, offload="states")),
    }


def _train(rank, world_size, spec):
    results = {}
    for name, each in _specs(spec).items():
        for copies in (0, 2):
            parallel = replace(each.parallel, expert_copies=copies, copies_every=2)
            label = f"{name}-{copies}"
            run = replace(each, run_dir=spec.run_dir.parent / label, parallel=parallel)
            worker = join_worker(run, rank, world_size, label, float64=True)
            worker.train()
            losses = [line["loss"] for line in worker.progress(0) if line.get("kind") == "train"]
            results[name, copies] = (whole_state(worker), losses)
    return results


def test_a_run_with_copies_is_the_run_without(tmp_path):
    spec = make_spec(tmp_path, steps=STEPS, global_batch_size=8, checkpoint_every=STEPS)
    results = run_ranks(4, _train, spec)[0]
    for name in _specs(spec):
        (without, losses), (with_copies, same_losses) = results[name, 0], results[name, 2]
        assert_same_state(with_copies, without, name)
        assert same_losses == pytest.approx(losses, rel=1e-10)
        histories = [read_load_history(tmp_path / f"{name}-{copies}") for copies in (0, 2)]
        assert np.array_equal(histories[0].counts, histories[1].counts)
        assert histories[0].bias.tobytes() == histories[1].bias.tobytes()
        placed = [event for event in read_events(tmp_path / f"{name}-2") if event["event"] == "copies_placed"]
        assert placed[0]["step"] == 2
        assert placed[0]["num_copies"] > 0
        assert placed[0]["after"] < placed[0]["before"]
        assert not [event for event in read_events(tmp_path / f"{name}-0") if event["event"] == "copies_placed"]


def _resume(rank, world_size, spec):
    worker = join_worker(spec, rank, world_size, f"resumed{spec.parallel.expert_copies}", float64=True)
    worker.train(resume_from=latest(spec.run_dir / "checkpoints"))
    return whole_state(worker)


def test_a_run_with_copies_resumes_without_them_and_the_other_way_round(tmp_path):
    states = {}
    for first, then in ((2, 0), (0, 2), (0, 0)):
        spec = make_spec(tmp_path, steps=4, global_batch_size=8)
        spec = replace(
            spec, run_dir=tmp_path / f"run{first}{then}", parallel=ParallelConfig(expert_copies=first, copies_every=1)
        )
        run_ranks(2, _start, spec)
        spec = replace(
            spec,
            run=replace(spec.run, steps=STEPS),
            parallel=ParallelConfig(expert_copies=then, copies_every=1),
        )
        states[first, then] = run_ranks(2, _resume, spec)[0]
    assert_same_state(states[2, 0], states[0, 0], "then without")
    assert_same_state(states[0, 2], states[0, 0], "then with")


def _start(rank, world_size, spec):
    join_worker(spec, rank, world_size, "first", float64=True).train()


def test_what_copies_do_not_work_with_is_refused():
    assert BACKENDS["node"].takes_copies
    for settings, message in (
        ({"expert_copies": -1}, r"expert_copies \(-1\) must be a whole number"),
        ({"expert_copies": 1, "copies_every": 0}, r"copies_every \(0\) must be a whole number of steps"),
        ({"expert_copies": 1, "shard": "optimizer"}, "needs each expert whole .* set --parallel.shard none"),
        ({"expert_copies": 1, "pipeline": PipelineConfig(size=2)}, r"pipeline.size \(2\) divides them"),
        ({"expert_copies": 1, "exchange": "deep_ep"}, "not for parallel.exchange deep_ep, .* rank, assignment, node"),
    ):
        with pytest.raises(InvalidValue, match=message):
            ParallelConfig(**settings)
