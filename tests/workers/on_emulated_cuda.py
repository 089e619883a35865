"""Whole trainings on the emulated CUDA device beside the same on the CPU. Run by test_emulated_cuda.py."""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dispatch.config import ScheduleConfig
from tests.emulated_cuda.library import skip_elsewhere
from tests.emulated_cuda.tensor import WAITS
from tests.ranks import run_ranks
from tests.workers.training_gang import assert_same_state, join_worker, make_spec, whole_state
from workers.checkpoints.checkpoint_files import CHECKPOINTS, checkpoint_path
from workers.distributed.pipeline import PipelineConfig
from workers.generation.generate import SamplingConfig
from workers.record.run_log import read_metrics
from workers.training.worker_spec import WorkerSpec

skip_elsewhere()

from tests.emulated_cuda.device import emulated_cuda  # noqa: E402 - it imports Triton's interpreter

STEPS, SAVED_AT = 3, 2
Change = Mapping[str, Mapping[str, Any]]  # sections of the settings, and what is changed in each
LAYOUTS: dict[str, Change] = {
    "rows by assignment, states on the host": {"parallel": {"exchange": "assignment"}, "optim": {"offload": "states"}},
    "chunks, recompute": {"parallel": {"schedule": ScheduleConfig(num_chunks=2)}, "model": {"recompute": "full"}},
    "sharded": {"parallel": {"shard": "full", "ep_size": 1}},
    "sharded moments, shared sequences": {"parallel": {"shard": "optimizer", "context": 2}},
    "copies of experts": {"parallel": {"expert_copies": 1, "copies_every": 1}},
    "a pipeline": {"parallel": {"pipeline": PipelineConfig(size=2), "ep_size": 1}},
}


def _spec(folder: Path, device: str, change: Change) -> WorkerSpec:
    settings = {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "checkpoint_every": SAVED_AT}
    spec = make_spec(folder, eval_sequences=2, **settings | change.get("run", {}))
    spec = replace(spec, device=device, model=replace(spec.model, max_seq_len=8))  # interpreted: a millisecond a row
    for section in change.keys() - {"run"}:
        spec = replace(spec, **{section: replace(getattr(spec, section), **change[section])})
    return spec


# The state after a training, after one that was resumed, and what the model then writes.
Trained = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[int, str]]


def _device(name: str) -> AbstractContextManager[None]:
    return emulated_cuda() if name == "cuda" else nullcontext()


def _trained(rank: int, size: int, folder: Path, device: str, change: Change, dtype: torch.dtype) -> Trained:
    """Train, resume from the checkpoint of a step before the last, and generate."""
    join = partial(join_worker, rank=rank, world_size=size, float64=dtype == torch.float64, timeout_s=60.0)
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "0"  # its own experts, not the kernels
    with _device(device):
        worker = join(_spec(folder, device, change), name="whole")
        worker.train()
        whole, saved = whole_state(worker), worker._spec.run_dir / CHECKPOINTS
        worker = join(_spec(folder, device, change), name="resumed")
        worker.train(resume_from=checkpoint_path(saved, SAVED_AT))
        resumed = whole_state(worker)
        worker = join(_spec(folder, device, {**change, "parallel": {}}), name="writing")
        texts = worker.generate(checkpoint_path(saved, STEPS), ["9"], SamplingConfig(max_new_tokens=3)).texts
    return whole, resumed, texts


def _on(device: str, folder: Path, change: Change, dtype: torch.dtype = torch.float64) -> Trained:
    """What two ranks find, told by the first."""
    make_spec(folder)  # the text, before two write it
    return run_ranks(2, _trained, folder, device, change, dtype)[0]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return _on("cpu", tmp_path_factory.mktemp("cpu"), {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_on_cuda_gives_the_weights_of_one_on_the_cpu(layout, on_cpu, tmp_path):
    """Also when it is resumed, from copies that were taken beside the training."""
    whole, resumed, texts = _on("cuda", tmp_path, LAYOUTS[layout])
    assert_same_state(whole, on_cpu[0], layout)
    assert_same_state(resumed, on_cpu[0], f"{layout}, resumed")
    assert texts == on_cpu[2]


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_training_in_bfloat16_on_cuda_has_the_losses_of_one_on_the_cpu(shard, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        folder.mkdir()
        change = {"run": {"dtype": "bfloat16"}, "parallel": {"shard": shard, "ep_size": 1}}
        _on(device, folder, change, torch.float32)
        losses.append([line["loss"] for line in read_metrics(folder / "run")[0]])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=0)


def _waits(rank: int, size: int, folder: Path) -> Counter[str]:
    """Where two steps wait for the device: what four steps do and two do not."""
    found = []
    for steps in (2, 4):
        change = {"run": {"steps": steps, "checkpoint_every": 0}}
        own = folder / str(steps)
        with emulated_cuda():
            worker = join_worker(_spec(own, "cuda", change), rank, size, "waits", timeout_s=60.0)
            WAITS.counts.clear()
            worker.train()
            found.append(Counter(WAITS.counts))
    return found[1] - found[0]


def test_a_step_waits_for_the_device_to_plan_exchanges_and_to_report_and_nowhere_else(tmp_path):
    num_layers, num_micro = 2, 2
    of_a_step = {
        "dispatch/values.py host_lists": num_layers * num_micro,  # how many rows travel
        "dispatch/balance.py read_counts": 1,
        "dispatch/balance.py read_bias": 1,
        "workers/training/gradients.py global_grad_norm": 1,  # a step whose gradient is not finite is skipped
        "workers/training/summed_metrics.py values_to_sum": 1,
        "dispatch/diagnosis/meter.py take": 2,
    }
    for steps in ("2", "4"):
        (tmp_path / steps).mkdir()
        make_spec(tmp_path / steps)
    assert run_ranks(2, _waits, tmp_path)[0] == {name: 2 * count for name, count in of_a_step.items()}
