"""Muon against one matrix at a time, by its singular values; and spread over ranks against one process, in float64."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dispatch.config import MoEConfig
from dispatch.errors import InvalidValue
from dispatch.exchange.local import LocalDispatcher
from tests.ranks import run_ranks
from tests.workers.training.test_optimizer import Stack, set_gradients
from tests.workers.training.test_sharding import PLAIN, assert_equals_one_process, train_all
from workers.checkpoints import checkpoint
from workers.checkpoints.state import canonical_state
from workers.distributed.sharded import all_rows, local_rows
from workers.model.attention import LatentConfig
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.model_config import ModelConfig
from workers.training import muon
from workers.training.muon import newton_schulz
from workers.training.optimizer import OptimConfig, build_optimizer

STEPS, HEADS, KV_HEADS, HEAD_DIM, FFN = 3, 4, 2, 2, 6
LATENT = {"attention": "latent", "latent": LatentConfig(kv_rank=4), "query_key_norm": "none"}
LATENT |= dict.fromkeys(("qkv_bias", "out_bias", "attention_sinks", "attention_gate"), False)
CONFIG = OptimConfig(name="muon", lr=0.02, weight_decay=0.5, beta1=0.8, options={"momentum": 0.9})
ADAMW = ("token_embedding", "lm_head", "router", "norm", "token_gate", "bias", "sinks")


def make_model(**settings: Any) -> Decoder:
    """Every kind of parameter there is: fused and biased queries, gates, dense, shared and biased experts, MTP."""
    config = ModelConfig(
        vocab_size=7,
        hidden=8,
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        dense_ffn_hidden=10,
        num_mtp_layers=1,
        moe=MoEConfig(num_experts=4, top_k=2, ffn_hidden=FFN, shared_gate=True, gate_bias=True, expert_biases=True),
        **{
            "qkv_bias": True,
            "out_bias": True,
            "attention_sinks": True,
            "attention_gate": True,
            "query_key_norm": "head",
        }
        | settings,
    )
    model = Decoder(config, lambda: LocalDispatcher(4)).double()
    init_weights(model, seed=0)
    return model


def matrices_of(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """Views of the single matrices in a parameter that Muon updates, none for one that is AdamW's."""
    if any(word in name for word in ADAMW):
        return
    if name.endswith("qkv_proj.weight"):
        queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        yield from (tensor[:queries], tensor[queries : queries + keys], tensor[queries + keys :])
    elif name.endswith("experts.gate_up_proj"):
        for expert in tensor:
            yield from (expert[:FFN], expert[FFN:])
    else:
        yield from tensor if tensor.ndim == 3 else [tensor]


def orthogonal(matrix: Tensor, num_steps: int) -> Tensor:
    """The polynomial of each singular value by itself."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(num_steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("nesterov", [0, 1])
@pytest.mark.parametrize("settings", [{}, LATENT])
def test_updates_are_those_of_one_matrix_at_a_time_and_of_adamw(nesterov: int, settings: dict[str, Any]) -> None:
    model = make_model(**settings)
    reference = copy.deepcopy(model)
    options = {"momentum": 0.9, "ns_steps": 4, "nesterov": nesterov}
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.02, weight_decay=0.5, options=options))
    adamw = build_optimizer(reference, OptimConfig(lr=0.02, weight_decay=0.5))
    moved = {
        name: [(each, torch.zeros_like(each)) for each in matrices_of(name, parameter.detach())]
        for name, parameter in reference.named_parameters()
    }
    for step in range(STEPS):
        set_gradients(model, seed=step)
        for (name, parameter), own in zip(reference.named_parameters(), model.parameters(), strict=True):
            assert own.grad is not None
            for (weight, momentum), gradient in zip(moved[name], matrices_of(name, own.grad), strict=True):
                momentum.mul_(0.9).add_(gradient)
                direction = gradient + 0.9 * momentum if nesterov else momentum
                scale = 0.2 * max(weight.shape) ** 0.5
                weight.mul_(1 - 0.02 * 0.5).sub_(0.02 * scale * orthogonal(direction, 4))
            parameter.grad = None if moved[name] else own.grad.clone()
        optimizer.step()
        adamw.step()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        tolerance = 1e-10 if moved[name] else 0.0  # AdamW's are the same bits
        difference = (parameter - expected).abs().max().item()
        assert difference <= tolerance, name
    assert sum(map(bool, moved.values())) > 15
    assert sum(not each for each in moved.values()) > 15


def test_singular_values_end_near_one_and_zeros_stay() -> None:
    matrices = torch.randn(6, 12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices[3] = 0
    result = newton_schulz(matrices, 5)
    values = torch.linalg.svdvals(result[[0, 1, 2, 4, 5]])
    assert 0.68 < values.min() < values.max() < 1.21
    assert not result[3].any()
    assert newton_schulz(matrices[:0], 5).shape == (0, 12, 20)


def test_an_update_has_the_root_mean_square_of_adamw() -> None:
    for shape in ((48, 32), (32, 48)):
        model = nn.Linear(*shape, bias=False)
        before = model.weight.detach().clone()
        set_gradients(model, seed=0)
        build_optimizer(model, OptimConfig(name="muon", lr=0.1, weight_decay=0.0)).step()
        update = model.weight.detach() - before
        assert update.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)


@pytest.mark.parametrize("at_once", [muon.MAX_ELEMENTS_AT_ONCE, 3 * 32 * 16 + 1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stack_of_experts_and_its_parts_are_updated_bit_for_bit_alike(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "MAX_ELEMENTS_AT_ONCE", at_once)  # experts: all, 3, 1
    start = torch.randn(10, 32, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    stack, *parts = (Stack(weight) for weight in (start, *start.split([7, 1, 2])))
    optimizers = [build_optimizer(model, CONFIG) for model in (stack, *parts)]
    for step in range(STEPS):
        set_gradients(stack, seed=step)
        assert stack.weight.grad is not None
        for part, gradient in zip(parts, stack.weight.grad.split([7, 1, 2]), strict=True):
            part.weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(stack.weight, torch.cat([part.weight for part in parts]))


def test_the_state_is_the_one_known_before_the_first_step_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def step(optimizer: torch.optim.Optimizer, model: Decoder, seed: int) -> None:
        set_gradients(model, seed=seed)
        optimizer.step()

    models = [make_model() for _ in range(2)]
    optimizers = [build_optimizer(model, CONFIG) for model in models]
    both = list(zip(models, optimizers, strict=True))
    before, after = (canonical_state(*each, CONFIG.entry.initial_state) for each in both)
    step(optimizers[0], models[0], seed=1)
    path = checkpoint.save(tmp_path, 1, before, {}, None)
    checkpoint.load(path, after, None, sections=("model", "optim"))
    for model, optimizer in both:
        step(optimizer, model, seed=2)
    first, second = (canonical_state(*each) for each in both)
    assert first.keys() == second.keys() == before.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    held = {name.removeprefix("optim.") for name in first if name.startswith("optim.")}
    assert "momentum_buffer.layers.1.moe.experts.3.gate_up_proj" in held
    assert "exp_avg_sq.layers.1.moe.router.weight" in held
    for name, parameter in models[0].named_parameters():
        is_matrix = any(True for _ in matrices_of(name, parameter))
        keys = {"momentum_buffer"} if is_matrix else {"step", "exp_avg", "exp_avg_sq"}
        assert optimizers[0].state[parameter].keys() == keys, name


def whole_of_uneven_rows(rank: int, world_size: int) -> list[Tensor]:
    mesh, found = init_device_mesh("cpu", (world_size,)), []
    for num_rows in (4, 5, 3, 9):  # of 4 ranks, with 5 rows: 2, 2, 1 and 0
        sharded = distribute_tensor(torch.arange(2.0 * num_rows).view(num_rows, 2), mesh, [Shard(0)])
        found.append(all_rows(sharded.to_local(), sharded))
    return found


def updates_of_five_rows(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Of a matrix that lies on the ranks as 2, 2, 1 and 0 rows: its value after two steps, and of the whole matrix."""
    mesh = init_device_mesh("cpu", (world_size,))
    start, *gradients = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    models = [Stack(distribute_tensor(start, mesh, [Shard(0)])), Stack(start)]
    optimizers = [build_optimizer(model, CONFIG) for model in models]
    for gradient in gradients:
        models[0].weight.grad, models[1].weight.grad = distribute_tensor(gradient, mesh, [Shard(0)]), gradient
        for optimizer in optimizers:
            optimizer.step()
    return all_rows(local_rows(models[0].weight)[0], models[0].weight), models[1].weight.detach()


def test_a_rank_without_rows_of_a_matrix_takes_part() -> None:
    for sharded, whole in run_ranks(4, updates_of_five_rows):
        assert torch.equal(sharded, whole)


LAYOUTS = [
    *(("none", ep_size, "none", 1, PLAIN, "muon") for ep_size in (1, 2, 4)),
    ("optimizer", 2, "none", 2, PLAIN, "muon"),
    *(("full", ep_size, "full", 1, PLAIN, "muon") for ep_size in (1, 2, 4)),
]


def test_any_division_over_ranks_trains_the_model_of_one_process() -> None:
    one = run_ranks(1, train_all, [("none", 1, "none", 1, PLAIN, "muon")])[0][0]
    by_rank = run_ranks(4, train_all, LAYOUTS)
    for index, layout in enumerate(LAYOUTS):
        found = [each[index] for each in by_rank]
        assert_alike_on_all_ranks(found)
        assert_equals_one_process(str(layout), found, one)


def assert_alike_on_all_ranks(by_rank: list[dict[str, Any]]) -> None:
    first: dict[str, Any] = {}
    for found in by_rank:
        for part in found.keys() - {"norms", "counts"}:
            assert torch.equal(found[part], first.setdefault(part, found[part])), part


def test_rows_of_all_ranks_come_together_in_order() -> None:
    for found in run_ranks(4, whole_of_uneven_rows):
        for whole, num_rows in zip(found, (4, 5, 3, 9), strict=True):
            assert torch.equal(whole, torch.arange(2.0 * num_rows).view(num_rows, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"optim.options.momentum \(1\) must be in \[0, 1\)"),
        ({"ns_steps": 2.5}, r"optim.options.ns_steps \(2.5\) must be a whole number from 1 to 99"),
        ({"ns_steps": 0}, r"ns_steps \(0\)"),
        ({"nesterov": 2}, r"optim.options.nesterov \(2\) must be 1 \(on\) or 0 \(off\)"),
    ],
)
def test_impossible_options_are_refused_before_anything_starts(options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        OptimConfig(name="muon", options=options)
