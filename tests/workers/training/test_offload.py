"""Optimizer state in host memory: the bits of a run without, few bytes on the device, checkpoints that do not know."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dispatch.config import MoEConfig
from dispatch.errors import InvalidValue
from dispatch.exchange.factory import make_dispatcher
from dispatch.exchange.local import LocalDispatcher
from tests.ranks import run_ranks
from tests.workers.training.test_gradients import form_groups
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.checkpoints.checkpoint_files import checkpoint_path
from workers.checkpoints.state import canonical_state
from workers.distributed.parallel import ParallelConfig, RankGroups, Shard
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.model_config import ModelConfig
from workers.training import offload
from workers.training.gradients import clip_gradients, global_grad_norm, reduce_gradients
from workers.training.offload import HostStates
from workers.training.optimizer import PIECES_AT_ONCE, OptimConfig, build_optimizer, decay_groups
from workers.training.sharding import set_sync, shard_states

STEPS, SEQUENCES, NUM_EXPERTS = 5, 8, 8
PIECE_BYTES = 4096  # of about 100 KB of moments: many pieces, some of one parameter
CONFIG = ModelConfig(
    vocab_size=64,
    hidden=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    dense_ffn_hidden=48,
    max_seq_len=8,
    moe=MoEConfig(num_experts=NUM_EXPERTS, top_k=2, ffn_hidden=16),
)
OPTIMIZERS = ("adamw", "adamw_bf16", "muon")
SHARDS: tuple[Shard, ...] = ("none", "optimizer", "full")


def build(groups: RankGroups, shard: Shard) -> Decoder:
    with torch.device("meta"):
        model = Decoder(CONFIG, lambda: make_dispatcher(NUM_EXPERTS, groups.ep_group, hidden=32, top_k=2))
    shard_states(model, groups, shard)
    model.to_empty(device="cpu")
    init_weights(model, seed=3)
    return model


def train(groups: RankGroups, shard: Shard, optim: OptimConfig) -> dict[str, Tensor]:
    """Clipped steps of changing rates; weights and optimizer state by their names in a checkpoint."""
    model = build(groups, shard)
    optimizer = build_optimizer(model, optim)
    for group in optimizer.param_groups[1:]:
        group["lr_scale"] = 0.5
    host = HostStates(model, optimizer, optim.initial_state, PIECE_BYTES)
    for step in range(STEPS):
        tokens = torch.randint(64, (SEQUENCES, 9), generator=torch.Generator().manual_seed(step))
        rows = tokens.tensor_split(groups.world_size)[groups.rank]
        set_sync(model, shard, is_last=True)
        (model(rows[:, :-1], targets=rows[:, 1:]).total / (SEQUENCES * 8)).backward()
        reduce_gradients(model, groups)
        norm = global_grad_norm(model, groups)
        clip_gradients(model, norm, norm / 2)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1) * group.get("lr_scale", 1.0)
        (host if optim.offload == "states" else optimizer).step()
        optimizer.zero_grad()
    return {name: each.clone() for name, each in canonical_state(model, optimizer).items()}


def train_all(rank: int, world_size: int, optimizer: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    groups = form_groups(rank, world_size, 2)
    without = OptimConfig(name=optimizer, weight_decay=0.1)
    pairs = (without, replace(without, offload="states"))
    return [tuple(train(groups, shard, optim) for optim in pairs) for shard in SHARDS]  # type: ignore[misc]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_bit_is_that_of_a_run_without(optimizer: str) -> None:
    for found in run_ranks(4, train_all, optimizer):
        for shard, (without, offloaded) in zip(SHARDS, found, strict=True):
            assert offloaded.keys() == without.keys(), shard
            differing = [name for name in without if not torch.equal(offloaded[name], without[name])]
            assert differing == [], shard


def small_model() -> Decoder:
    config = replace(CONFIG, num_layers=4)
    model = Decoder(config, lambda: LocalDispatcher(NUM_EXPERTS))
    init_weights(model, seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    return model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_pieces_at_most_are_on_the_device(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = most = 0
    original = offload.copy_to_device

    def counted(on_host: Tensor, parameter: Tensor) -> Tensor:
        nonlocal alive, most
        value = original(on_host, parameter)
        alive, most = alive + value.nbytes, max(most, alive + value.nbytes)
        weakref.finalize(value, freed, value.nbytes)
        return value

    def freed(num_bytes: int) -> None:
        nonlocal alive
        alive -= num_bytes

    monkeypatch.setattr(offload, "copy_to_device", counted)
    model, optim = small_model(), OptimConfig(name=optimizer, offload="states")
    updates = build_optimizer(model, optim)
    HostStates(model, updates, optim.initial_state, PIECE_BYTES).step()
    of_parameters = [sum(v.nbytes for v in state.values() if v.ndim) for state in updates.state.values()]
    piece = max(PIECE_BYTES, *of_parameters)
    assert alive == 0
    assert piece < most <= PIECES_AT_ONCE * piece < sum(of_parameters) / 2


def test_state_is_the_same_memory_from_step_to_step() -> None:
    model, optim = small_model(), OptimConfig(offload="states")
    updates = build_optimizer(model, optim)
    host = HostStates(model, updates, optim.initial_state, PIECE_BYTES)
    places = []
    for _ in range(2):
        host.step()
        tensors = canonical_state(model, updates).items()
        places.append({name: each.data_ptr() for name, each in tensors if name.startswith("optim.exp_avg")})
    assert places[0] == places[1]
    assert places[0]


def test_gradients_are_there_after_a_step_and_what_has_none_stays() -> None:
    model, optim = small_model(), OptimConfig(offload="states")
    frozen = model.token_embedding.weight
    frozen.grad, before = None, frozen.detach().clone()
    updates = build_optimizer(model, optim)
    HostStates(model, updates, optim.initial_state, PIECE_BYTES).step()
    assert torch.equal(frozen, before)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter is not frozen)


def test_state_that_an_optimizer_makes_in_its_step_moves_too() -> None:
    def run(offloads: bool) -> nn.Module:
        model = small_model()
        groups = decay_groups(model, OptimConfig())
        updates = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        host = HostStates(model, updates, lambda _name, _parameter: {}, PIECE_BYTES)
        for _ in range(3):
            (host if offloads else updates).step()
        return model

    for one, other in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"optim\.offload is 'weights'; it must be one of none, states"):
        OptimConfig(offload="weights")  # type: ignore[arg-type]


# Layout and offload of the run that saves, and of the one that goes on from a step: 2 is in memory, 3 on the disk.
WITH, WITHOUT = "states", "none"
FULL, WHOLE = ParallelConfig(shard="full", ep_size=1), ParallelConfig(ep_size=2)
ACROSS = [(FULL, WITH, FULL, WITHOUT, 2), (FULL, WITHOUT, FULL, WITH, 2), (FULL, WITH, WHOLE, WITH, 3)]


def run_across(rank: int, world_size: int, spec: Any) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """By pair: the state where the first run is cut, and after the last step of the second."""
    found = []
    for index, (parallel, before, other, after, step) in enumerate(ACROSS):
        here = replace(spec, run_dir=spec.run_dir.parent / f"{before}-{index}", parallel=parallel)
        first = join_worker(with_offload(here, before), rank, world_size, f"first-{index}", stop_after=3)
        first.train(None)
        at_cut = whole_state(first)
        first.write_held(2)
        second = join_worker(with_offload(replace(here, parallel=other), after), rank, world_size, f"second-{index}")
        second.train(checkpoint_path(here.run_dir / "checkpoints", step))
        found.append((at_cut, whole_state(second)))
    return found


def with_offload(spec: Any, choice: Any) -> Any:
    return replace(spec, optim=replace(spec.optim, offload=choice))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_with_or_without_in_any_layout(tmp_path: Path, optimizer: str) -> None:
    spec = make_spec(tmp_path, steps=4, eval_every=0, memory_checkpoint_every=1, keep_checkpoints=9)
    spec = replace(spec, optim=replace(spec.optim, name=optimizer))
    into_none, into_states, moved = run_ranks(2, run_across, spec)[0]
    for one, other in ((into_none, into_states), (into_none, moved)):
        for place in (0, 1):
            assert one[place].keys() == other[place].keys()
    for place in (0, 1):
        assert all(torch.equal(each, into_states[place][name]) for name, each in into_none[place].items())
    for name, each in into_none[1].items():
        torch.testing.assert_close(moved[1][name], each, rtol=1e-4, atol=1e-5)
