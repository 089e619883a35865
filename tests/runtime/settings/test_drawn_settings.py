"""Every configuration that the checks accept trains as one process with plain settings does; others are refused."""

import random
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dispatch.errors import InvalidValue
from runtime.job.launch import make_spec
from runtime.settings.config import TrainConfig
from tests.ranks import run_ranks
from tests.runtime.settings.drawn_settings import (
    ALWAYS,
    STEPS,
    accepted,
    checked,
    draw,
    has_other_loss,
    on_one_process,
    texts,
    with_values,
)
from tests.workers.training_gang import join_worker, whole_state
from workers.checkpoints.checkpoint_files import checkpoint_path
from workers.data.prepare import prepare_dataset

# Seeds of draws by number of ranks: enough to name most settings in each.
SEEDS = {1: range(3), 2: range(100, 106), 4: range(200, 208)}
# What found a defect, by number of ranks.
SMALL = {"model.hidden": 8, "model.num_heads": 2, "model.num_layers": 2, "model.max_seq_len": 8}
FOUND: dict[int, list[dict[str, Any]]] = {
    1: [{"parallel.exchange": "node"}],
    2: [{"parallel.exchange": "node", "parallel.ep_size": 1, "parallel.expert_copies": 2}],
    4: [{"parallel.exchange": "node", "parallel.ep_size": 1, "parallel.ranks_per_node": 1, "parallel.shard": "full"}],
}


@pytest.fixture
def base(tmp_path):
    config = TrainConfig()
    return replace(config, data=replace(config.data, path=texts(tmp_path / "texts"), cache_dir=str(tmp_path / "cache")))


def test_any_settings_are_taken_or_refused_with_a_sentence(base):
    num_taken, rng = 0, random.Random(0)
    for _ in range(400):
        values = draw(rng, rng.choice([1, 2, 3, 4, 6, 8]))
        try:
            checked(values, base)
            num_taken += 1
        except InvalidValue as error:
            assert len(str(error)) > 40, values
    assert num_taken > 10


def _settings(base, num_ranks):
    """By name: what was drawn, and what found a defect."""
    drawn = {f"seed{seed}": accepted(seed, num_ranks, base) for seed in SEEDS[num_ranks]}
    fixed = [{**ALWAYS, **SMALL, **values, "cluster.num_workers": num_ranks} for values in FOUND[num_ranks]]
    return drawn | {f"found{index}": values for index, values in enumerate(fixed)}


def _train(rank, world_size, specs):
    """By name: state, biases and losses of a run, and the tensors that the same run has otherwise once resumed."""
    results = {}
    for name, spec in specs.items():
        worker = join_worker(spec, rank, world_size, name, float64=True)
        worker.train()
        state = whole_state(worker)
        biases = torch.cat([router.expert_bias_E for router in worker._state.routers.values()])
        losses = [line["loss"] for line in worker.progress(0) if line.get("kind") == "train"]
        results[name] = state, biases, losses, _otherwise_resumed(rank, world_size, name, spec, state)
    return results


def _otherwise_resumed(rank, world_size, name, spec, state):
    again = replace(spec, run_dir=spec.run_dir.parent / f"{spec.run_dir.name}-again")
    if rank == 0:
        shutil.copytree(spec.run_dir, again.run_dir)
    dist.barrier()
    worker = join_worker(again, rank, world_size, f"{name}-again", float64=True)
    worker.train(checkpoint_path(again.run_dir / "checkpoints", STEPS - 1))
    resumed = whole_state(worker)
    assert resumed.keys() == state.keys()
    return [key for key, tensor in state.items() if not torch.equal(resumed[key], tensor)]


def _specs(folder, configs):
    return {name: make_spec(config, folder / name, prepare_dataset(config.data)) for name, config in configs.items()}


def _expect_close(state, expected, what):
    assert state.keys() == expected.keys(), what
    for key, tensor in expected.items():
        atol = 1e-9 * max(tensor.abs().max().item(), 1e-8) if tensor.numel() else 0
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=atol, msg=lambda m, k=key: f"{what}: {k}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", SEEDS)
def test_whatever_is_accepted_trains_and_resumes_as_one_process_does(tmp_path, base, num_ranks):
    settings = _settings(base, num_ranks)
    configs = {name: with_values(base, values) for name, values in settings.items()}
    (tmp_path / "one").mkdir()
    ones = {name: on_one_process(config) for name, config in configs.items()}
    one = run_ranks(1, _train, _specs(tmp_path / "one", ones))[0]
    (tmp_path / "many").mkdir()
    ranks = run_ranks(num_ranks, _train, _specs(tmp_path / "many", configs), timeout_s=600)
    for name, (state, biases, losses, otherwise) in ranks[0].items():
        what = f"{name} {settings[name]}"
        assert all(torch.equal(rank[name][1], biases) for rank in ranks), what
        # Copies are placed anew after a resumption, so that sums are taken in another order.
        assert not otherwise or configs[name].parallel.expert_copies, what
        if has_other_loss(configs[name]):
            continue
        expected, expected_biases, expected_losses, _ = one[name]
        assert losses == pytest.approx(expected_losses, rel=1e-9), what
        assert torch.equal(biases, expected_biases), what
        _expect_close(state, expected, what)
