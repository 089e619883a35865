"""AdamW, and which parameters it decays."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dispatch.balance import routers_of
from dispatch.config import MoEConfig
from dispatch.exchange.local import LocalDispatcher
from tests.workers.model.token_loss import token_nll_sum
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.model_config import ModelConfig
from workers.training.optimizer import OptimConfig, build_optimizer, is_hidden_matrix

NO_DECAY = OptimConfig(lr=0.01, weight_decay=0.0)


def small_model() -> Decoder:
    moe = MoEConfig(num_experts=4, top_k=2, ffn_hidden=6)
    config = ModelConfig(
        vocab_size=7, hidden=8, num_layers=2, num_heads=2, num_kv_heads=1, dense_ffn_hidden=10, moe=moe
    )
    model = Decoder(config, lambda: LocalDispatcher(4))
    init_weights(model, seed=0)
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_only_matrices_decay_and_every_trainable_parameter_is_there_once() -> None:
    model = small_model()
    model.lm_head.weight.requires_grad_(False)
    decayed, kept = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 3}
    assert {p.ndim for p in kept["params"]} == {1}
    held = [id(p) for p in decayed["params"] + kept["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_stacked_biases_of_experts_are_vectors() -> None:
    moe = MoEConfig(num_experts=4, top_k=2, ffn_hidden=6, expert_biases=True)
    model = Decoder(
        ModelConfig(hidden=8, num_heads=2, num_layers=1, num_dense_layers=0, moe=moe), lambda: LocalDispatcher(4)
    )
    decayed, kept = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    biases = {name for name in names.values() if name.endswith("bias")}
    assert biases == {f"layers.0.moe.experts.{name}_proj_bias" for name in ("gate_up", "down")}
    assert biases < {names[id(parameter)] for parameter in kept["params"]}
    assert not any(is_hidden_matrix(name, parameter) for name, parameter in model.named_parameters() if name in biases)
    assert not biases & {names[id(parameter)] for parameter in decayed["params"]}


def test_weight_decay_leaves_expert_bias_alone() -> None:  # B15
    model = small_model()
    router = next(iter(routers_of(model).values()))
    router.expert_bias_E.copy_(torch.tensor([0.5, -0.5, 0.25, -0.25]))
    before = router.expert_bias_E.clone()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    ids = torch.arange(6).view(1, 6)
    token_nll_sum(model(ids), ids).backward()
    optimizer.step()
    assert torch.equal(router.expert_bias_E, before)


def test_updates_follow_the_formula_of_adamw() -> None:
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    weight = model.weight.detach().clone()
    config = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        set_gradients(model, seed=step)
        gradient = model.weight.grad
        assert gradient is not None
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        corrected_mean, corrected_square = mean / (1 - 0.8**step), square / (1 - 0.9**step)
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * corrected_mean / (corrected_square.sqrt() + 1e-6)
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_moments_in_bf16_have_the_expectation_of_adamw_and_the_stated_deviation(beta2: float) -> None:
    configs = [OptimConfig(name=name, beta2=beta2) for name in ("adamw", "adamw_bf16")]
    models = [nn.Linear(400, 250, bias=False) for _ in configs]
    optimizers = [build_optimizer(model, config) for model, config in zip(models, configs, strict=True)]
    largest: dict[str, Tensor] = {}
    for step in range(150):
        # Smaller from step to step: rounded to the nearest, the mean square would stop above what it should be.
        for model, optimizer in zip(models, optimizers, strict=True):
            set_gradients(model, seed=step)
            assert model.weight.grad is not None
            model.weight.grad *= 0.98**step
            optimizer.step()
        exact, rounded = (optimizer.state[model.weight] for model, optimizer in zip(models, optimizers, strict=True))
        for name in ("exp_avg", "exp_avg_sq"):
            largest[name] = torch.maximum(largest.get(name, exact[name].abs()), exact[name].abs())
    assert rounded["step"] == exact["step"] == 150
    for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", beta2)):
        assert rounded[name].dtype == torch.bfloat16
        error, bound = rounded[name].float() - exact[name], 2**-8 / (1 - beta**2) ** 0.5 * largest[name]
        deviation = error.square().mean().sqrt()
        assert 0 < deviation < bound.square().mean().sqrt()
        assert error.mean().abs() < 5 * deviation / len(error.flatten()) ** 0.5


def test_replicas_beside_different_numbers_of_experts_round_moments_alike() -> None:
    start = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    models = [nn.Sequential(Stack(torch.ones(num_experts, 4, 4)), Stack(start)) for num_experts in (2, 3)]
    for model in models:
        optimizer = build_optimizer(model, OptimConfig(name="adamw_bf16", lr=0.01))
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().sin()
            optimizer.step()
    assert torch.equal(models[0][1].weight, models[1][1].weight)


def test_a_step_with_moments_in_bf16_is_that_of_adamw_but_for_their_rounding() -> None:
    models = [nn.Linear(64, 50) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    names, lr = ("adamw", "adamw_bf16"), 0.01
    for model, name in zip(models, names, strict=True):
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=lr, weight_decay=0.5))
        for step in range(2):
            set_gradients(model, seed=step)
            optimizer.step()
            if step == 0:  # nothing has been rounded before
                first = model.weight.detach().clone()
        if name == "adamw":
            expected = first, model.weight.detach().clone()
    assert torch.equal(first, expected[0])
    difference = (models[1].weight - expected[1]).abs().max()
    assert 0 < difference < 0.1 * lr


class Stack(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stack_of_experts_and_its_parts_are_updated_bit_for_bit_alike(dtype: torch.dtype) -> None:
    # 48 elements an expert: a multiple of 16, not of the 32 or 64 that a kernel may unroll to.
    sizes = [7, 5, 1, 87]
    start = torch.randn(100, 12, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    stack, *parts = (Stack(weight) for weight in (start, *start.split(sizes)))
    models = [stack, *parts]
    optimizers = [build_optimizer(model, OptimConfig(lr=0.01)) for model in models]
    for step in range(10):
        set_gradients(stack, seed=step)
        assert stack.weight.grad is not None
        for part, gradient in zip(parts, stack.weight.grad.split(sizes), strict=True):
            part.weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(stack.weight, torch.cat([part.weight for part in parts]))


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_updates_are_deterministic_bit_for_bit(num_threads: int, name: str) -> None:  # parity 27
    threads_before = torch.get_num_threads()

    def train(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        model = nn.Linear(257, 300, bias=False)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        optimizer = build_optimizer(model, replace(NO_DECAY, name=name))
        for step in range(5):
            set_gradients(model, seed=step)
            optimizer.step()
        state = optimizer.state[model.weight]
        return [model.weight.detach(), state["exp_avg"], state["exp_avg_sq"]]

    try:
        first, again = train(1), train(num_threads)
    finally:
        torch.set_num_threads(threads_before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"lr": 0.0}, r"lr \(0.0\) must be above 0 and finite"),
        ({"lr": float("inf")}, r"lr \(inf\) must be above 0 and finite"),
        ({"warmup_steps": -1}, r"warmup_steps \(-1\) must be at least 0"),
        ({"grad_clip": float("nan")}, r"grad_clip \(nan\) must be at least 0"),
        ({"beta2": 1.0}, r"beta2 \(1.0\) must be in \[0, 1\)"),
        ({"min_lr_ratio": 1.5}, r"min_lr_ratio \(1.5\) must be in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**override)
