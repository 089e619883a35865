"""Runs that fail at any place, in every kind of layout, go on to the bits and records of an undisturbed one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dispatch.laws import BalanceConfig
from runtime.job.initial_weights import make_initial_checkpoint
from tests.ranks import run_ranks
from tests.workers.training_gang import assert_same_state, join_worker, make_spec, whole_state
from workers.checkpoints.checkpoint_files import latest
from workers.distributed.parallel import ParallelConfig
from workers.distributed.pipeline import PipelineConfig
from workers.model.lora import LoraConfig
from workers.record.run_log import read_load_history, read_metrics
from workers.training.fault_plan import Fault
from workers.training.worker_spec import WorkerSpec

State = dict[str, torch.Tensor]
PROMPTS = ("400 green", "")
STEPS = 5
INTERLEAVED = PipelineConfig(size=2, schedule="interleaved_1f1b")
EVERY = {"eval_every": 2, "checkpoint_every": 3, "sample_prompts": PROMPTS, "sample_tokens": 3}
IN_STAGES = {"micro_batch_size": 2, "sample_prompts": ()}
# By name: ranks, what is parallel, what else is not as usual, and the rank, step and phase of the failure. Copies of
# experts are not among them: a run that resumes begins without, and sums in another order until it has them again.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], tuple[int, int, str]]] = {
    "context": (2, {"context": 2, "ep_size": 1}, {}, (1, 4, "samples")),
    "muon": (2, {"ep_size": 2}, {"optim": {"name": "muon"}}, (0, 3, "checkpoint write")),
    "lora": (2, {}, {"model": {"lora": LoraConfig(rank=2)}}, (1, 4, "evaluation")),
    "offload": (2, {"shard": "full"}, {"optim": {"offload": "states"}}, (0, 4, "optimizer")),
    "pipeline": (2, {"pipeline": PipelineConfig(size=2)}, {"run": IN_STAGES}, (1, 4, "backward")),
    "interleaved": (
        2,
        {"pipeline": INTERLEAVED},
        {"run": IN_STAGES, "model": {"num_layers": 5}},
        (0, 1, "forward"),
    ),
    "replicas": (4, {"shard": "full", "replicate": 2, "ep_size": 1}, {"optim": {"name": "muon"}}, (2, 5, "gradients")),
}


def _spec(folder: Path, name: str) -> WorkerSpec:
    _, parallel, changes, _ = LAYOUTS[name]
    spec = make_spec(folder, steps=STEPS, **EVERY)
    spec = replace(spec, parallel=ParallelConfig(**parallel), balance=BalanceConfig(law="newton"))
    for section, values in changes.items():
        spec = replace(spec, **{section: replace(getattr(spec, section), **values)})
    return replace(spec, run_dir=folder / name)


def _beside(spec: WorkerSpec, name: str, *faults: Fault) -> WorkerSpec:
    return replace(spec, run_dir=spec.run_dir.with_name(f"{spec.run_dir.name}-{name}"), faults=faults)


def _train(rank: int, world_size: int, specs: list[WorkerSpec], attempt: int) -> list[State | None]:
    """The state of each run, None where it failed."""
    found: list[State | None] = []
    for spec in specs:
        worker = join_worker(spec, rank, world_size, f"{attempt}")
        try:
            worker.train(latest(spec.run_dir / "checkpoints") if attempt else None, again=attempt > 0)
            found.append(whole_state(worker))
        except Exception:  # noqa: BLE001 - of the fault, or of a connection that it broke
            worker.leave()
            found.append(None)
    return found


def _lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    times = ("time", "tokens_per_s", "tflops_per_s", "mfu")
    return [{k: v for k, v in line.items() if k not in times and not k.endswith("_s")} for line in lines]


SOON = ("context", "lora", "pipeline")
LATER = tuple(name for name, (num_ranks, *_) in LAYOUTS.items() if num_ranks == 2 and name not in SOON)


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        pytest.param(2, SOON, id="2"),
        pytest.param(2, LATER, id="2, the others", marks=pytest.mark.slow),
        pytest.param(4, ("replicas",), id="4", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_fails_anywhere_goes_on_to_the_same_bits_and_records(
    tmp_path: Path, world_size: int, names: tuple[str, ...]
) -> None:
    places = {name: LAYOUTS[name][3] for name in names}
    calm = [_spec(tmp_path, name) for name in places]
    faults = [Fault(rank=rank, step=step, phase=phase, action="raise") for rank, step, phase in places.values()]
    struck = [_beside(each, "struck", fault) for each, fault in zip(calm, faults, strict=True)]
    expected = run_ranks(world_size, _train, calm, 0)[0]
    assert run_ranks(world_size, _train, struck, 0) == [[None] * len(struck)] * world_size  # all fail, on all ranks
    recovered = run_ranks(world_size, _train, struck, 1)[0]
    for each in zip(struck, recovered, calm, expected, strict=True):
        _check(*each)


def _check(run: WorkerSpec, state: State | None, calm: WorkerSpec, expected: State | None) -> None:
    case = run.run_dir.name, run.faults
    assert state is not None and expected is not None and state.keys() == expected.keys(), case
    assert [key for key in expected if not torch.equal(state[key], expected[key])] == [], case
    for file in ("metrics.jsonl", *(["samples.jsonl"] if run.run.sample_prompts else ())):
        assert _lines(run.run_dir, file) == _lines(calm.run_dir, file), case
    histories = (read_load_history(each.run_dir)[:3] for each in (run, calm))
    assert all(np.array_equal(*pair) for pair in zip(*histories, strict=True)), case


@pytest.mark.parametrize("phase", ["samples", "backward"])
def test_a_run_that_begins_with_the_weights_of_another_records_step_0_once(tmp_path: Path, phase: str) -> None:
    spec = make_spec(tmp_path, steps=2, **EVERY)
    run_ranks(1, _train, [spec], 0)
    calm = _beside(spec, "calm")
    struck = _beside(spec, "struck", Fault(rank=0, step=int(phase != "samples"), phase=phase, action="raise"))
    for each in (calm, struck):
        make_initial_checkpoint(latest(spec.run_dir / "checkpoints"), each.run_dir)
    assert run_ranks(1, _train, [calm, struck], 1)[0][1] is None
    run_ranks(1, _train, [struck], 2)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert _lines(struck.run_dir, file) == _lines(calm.run_dir, file)
    assert [line["step"] for line in _lines(calm.run_dir, "samples.jsonl")] == [0, 0, 2, 2]


ROUTE = (
    {},
    {"pipeline": PipelineConfig(size=2)},
    {"shard": "full"},
    {"context": 2, "ep_size": 1},
    {"pipeline": INTERLEAVED},
    {"shard": "optimizer", "ep_size": 1},
)


def _stop_at_every_step(rank: int, world_size: int, spec: WorkerSpec) -> State:
    """Each step in another layout, with a stop that is asked for before the step begins."""
    for step, parallel in enumerate(ROUTE, 1):
        spec = replace(spec, parallel=ParallelConfig(**parallel))
        worker = join_worker(spec, rank, world_size, f"{step}", float64=True)
        worker.request_stop()
        assert worker.train(latest(spec.run_dir / "checkpoints")).step == step
    return whole_state(worker)


def _train_alone(rank: int, world_size: int, spec: WorkerSpec) -> State:
    worker = join_worker(spec, rank, world_size, "alone", float64=True)
    worker.train()
    return whole_state(worker)


def test_a_run_that_is_stopped_in_each_step_goes_on_in_any_layout(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, steps=len(ROUTE), eval_every=2, micro_batch_size=2)
    spec = replace(spec, model=replace(spec.model, num_layers=5))
    alone = replace(spec, run_dir=tmp_path / "alone")
    assert_same_state(run_ranks(2, _stop_at_every_step, spec)[0], run_ranks(1, _train_alone, alone)[0], "stopped")
    for found, expected in zip(read_metrics(spec.run_dir), read_metrics(alone.run_dir), strict=True):
        assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["step"] for line in read_metrics(spec.run_dir)[1]] == [0, 2, 4, 6]
