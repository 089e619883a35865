"""The layer on several ranks against one process on the same global batch, float64: outputs, every gradient, the
gradient norm, weights after SGD and after AdamW steps with the bias moving. One launch a world size."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from dispatch.balance import LossFreeBalancer, read_load, write_bias
from dispatch.dispatcher import LocalDispatcher
from dispatch.experts import EXPERT_WEIGHTS, expert_parameters, grouped_swiglu
from dispatch.laws import BalanceConfig
from dispatch.layer import MoEConfig, MoELayer
from dispatch.reference import reference_moe
from tests.dispatch.test_dispatcher import KINDS
from tests.ranks import run_ranks

HIDDEN, RTOL = 6, 1e-10


@dataclass(frozen=True)
class Case:
    name: str
    moe: dict = field(default_factory=dict)
    bias: tuple = ()  # (expert, value): forces where tokens go
    tokens: tuple = (5, 9, 2, 7)  # by rank: ranks differ

    @property
    def config(self):
        return MoEConfig(**{"num_experts": 8, "top_k": 2, "ffn_hidden": 5, "num_shared_experts": 0, **self.moe})


CASES = [
    Case("plain"),
    Case("top-1", {"top_k": 1}),
    Case("top-8 of 8", {"top_k": 8}),
    Case("shared experts and scale", {"num_shared_experts": 2, "route_scale": 2.5}),
    Case("softmax, weights not normalised", {"score": "softmax", "normalize_weights": False}),
    Case("groups", {"num_groups": 4, "groups_kept": 2, "top_k": 3}),
    Case("a rank without tokens", tokens=(5, 0, 4, 0)),
    Case("only the last rank has tokens", tokens=(0, 0, 0, 6)),
    Case("an expert without tokens", bias=((3, -50.0),)),
    Case("all to one expert", {"top_k": 1}, bias=((5, 50.0),)),
    Case("all to the first rank", bias=((0, 50.0), (1, 50.0))),
]


def _layer(case, dispatcher):
    torch.manual_seed(3)
    full = MoELayer(HIDDEN, case.config, LocalDispatcher(8)).double()
    layer = MoELayer(HIDDEN, case.config, dispatcher).double()
    ids = layer.experts.expert_ids
    state = full.state_dict()
    for name in EXPERT_WEIGHTS:
        state[f"experts.{name}"] = state[f"experts.{name}"][ids.start : ids.stop]
    layer.load_state_dict(state)
    for expert, value in case.bias:
        layer.router.expert_bias_E[expert] = value
    return layer


def _batch(case, world_size, rank):
    generator = torch.Generator().manual_seed(100 + rank)
    num_tokens = case.tokens[rank] if world_size > 1 else sum(case.tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return x, torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)


def _backward(layer, x, cotangent, num_global_tokens):
    x = x.clone().requires_grad_()
    y = layer(x)
    ((y * cotangent).sum() / num_global_tokens).backward()
    return y.detach(), x.grad


def _sum_dense_grads(layer, group):
    experts = expert_parameters(layer)
    for name, parameter in layer.named_parameters():
        if name not in experts and group is not None:
            dist.all_reduce(parameter.grad, group=group)


def _grad_norm(layer, group):
    experts = expert_parameters(layer)
    squares = {name: parameter.grad.square().sum() for name, parameter in layer.named_parameters()}
    of_experts = torch.stack([squares[name] for name in experts]).sum()
    if group is not None:
        dist.all_reduce(of_experts, group=group)
    return (of_experts + sum(value for name, value in squares.items() if name not in experts)).sqrt()


def _train(layer, batch, num_global_tokens, group, optimizer, num_steps):
    balancer = LossFreeBalancer(layer, BalanceConfig(rate=0.02), group)
    for _ in range(num_steps):
        optimizer.zero_grad()
        _backward(layer, *batch, num_global_tokens)
        _sum_dense_grads(layer, group)
        optimizer.step()
        balancer.step()
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def _measure(case, make_dispatcher, batch, num_global_tokens, group):
    layer = _layer(case, make_dispatcher())
    y, grad_x = _backward(layer, *batch, num_global_tokens)
    load = read_load({"router": layer.router})
    _sum_dense_grads(layer, group)
    result = {"y": y, "grad_x": grad_x, "load": load, "norm": _grad_norm(layer, group)}
    result["grads"] = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    for name, make_optimizer, num_steps in (
        ("sgd", lambda params: torch.optim.SGD(params, lr=1.0), 1),
        ("adamw", lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1), 5),
    ):
        layer = _layer(case, make_dispatcher())
        weights = _train(layer, batch, num_global_tokens, group, make_optimizer(layer.parameters()), num_steps)
        result[name] = weights | {"bias": layer.router.expert_bias_E.clone()}
    return result


def _parity_on_ranks(rank, world_size, kind):
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    results = {}
    for case in CASES:
        num_global_tokens = sum(case.tokens[:world_size])
        if num_global_tokens:
            make = lambda: KINDS[kind](8, dist.group.WORLD)  # noqa: E731
            results[case.name] = _measure(
                case, make, _batch(case, world_size, rank), num_global_tokens, dist.group.WORLD
            )
    return results


def _one_process(case, world_size):
    batches = [_batch(case, world_size, rank) for rank in range(world_size)]
    batch = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return _measure(case, lambda: LocalDispatcher(8), batch, len(batch[0]), None)


def _assert_weights(by_rank, one, what):
    for name, expected in one.items():
        parts = [result[name] for result in by_rank]
        if name.startswith("experts."):
            parts = [torch.cat(parts)]
        for part in parts:
            # P8: atol only for exact zeros beside numbers of order one; a mismatch prints its relative error.
            assert expected.abs().max() > 1e-4 or not expected.any()
            torch.testing.assert_close(part, expected, rtol=RTOL, atol=1e-14, msg=lambda m: f"{what} {name}: {m}")  # noqa: B023


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_one_process(kind, world_size):  # B13, P1, P2, P5, P8
    results = run_ranks(world_size, _parity_on_ranks, kind)
    assert set(results[0]) == {case.name for case in CASES if sum(case.tokens[:world_size])}
    for case in CASES:
        if case.name not in results[0]:
            continue
        by_rank, one = [result[case.name] for result in results], _one_process(case, world_size)
        for what in ("y", "grad_x"):
            got = torch.cat([result[what] for result in by_rank])
            torch.testing.assert_close(got, one[what], rtol=RTOL, atol=1e-14, msg=lambda m: f"{case.name} {what}: {m}")  # noqa: B023
        assert torch.equal(sum(result["load"] for result in by_rank), one["load"])
        for result in by_rank:
            torch.testing.assert_close(result["norm"], one["norm"], rtol=RTOL, atol=0)
        for what in ("grads", "sgd", "adamw"):
            _assert_weights([result[what] for result in by_rank], one[what], f"{case.name} {what}")


# The reference has routed experts only; shared ones are compared across ranks.
@pytest.mark.parametrize("case", [c for c in CASES if not c.config.num_shared_experts], ids=lambda case: case.name)
def test_one_process_equals_the_slow_reference(case):  # P1, P2
    layer = _layer(case, LocalDispatcher(8))
    x, cotangent = _batch(case, 1, 0)
    y, grad_x = _backward(layer, x, cotangent, 1)
    leaf = x.clone().requires_grad_()
    weights = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    gate_up, down = weights[1:]
    gate, up = gate_up.chunk(2, dim=1)
    slow, chosen = reference_moe(leaf, weights[0], layer.router.expert_bias_E, gate, up, down, case.config)
    (slow * cotangent).sum().backward()
    torch.testing.assert_close(y, slow.detach(), rtol=RTOL, atol=1e-14)
    torch.testing.assert_close(grad_x, leaf.grad, rtol=RTOL, atol=1e-14)
    for parameter, weight in zip(layer.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.grad, weight.grad, rtol=RTOL, atol=1e-14)
    assert layer.router.tokens_per_expert_E.tolist() == torch.tensor(chosen).flatten().bincount(minlength=8).tolist()


def test_an_expert_without_rows_gets_zero_gradients_and_not_none():  # B13
    layer = _layer(Case("idle", bias=((3, -50.0),)), LocalDispatcher(8))
    layer(torch.randn(20, HIDDEN, dtype=torch.float64)).sum().backward()
    for name in EXPERT_WEIGHTS:
        grad = getattr(layer.experts, name).grad
        assert grad[3].abs().max() == 0
        assert grad[4].abs().max() > 0


def test_grouped_matmul_path_equals_the_loop():
    # The path that CUDA takes in bf16, run here in fp32, where torch's grouped matmul works on CPU too.
    torch.manual_seed(0)
    dispatcher = LocalDispatcher(4)
    layer = MoELayer(16, MoEConfig(num_experts=4, top_k=2, ffn_hidden=8), dispatcher)
    ids = torch.tensor([[0, 2], [2, 0], [3, 2], [2, 0]])  # expert 1 has no row
    results = []
    for path in (layer.experts, lambda x, handle: grouped_swiglu(x, handle, *layer.experts.parameters())):
        layer.zero_grad()
        torch.manual_seed(1)
        x, weights = torch.randn(4, 16, requires_grad=True), torch.rand(4, 2, requires_grad=True)
        arrived, handle = dispatcher.dispatch(x, ids, weights)
        out = path(arrived, handle)
        out.square().sum().backward()
        grads = [parameter.grad.clone() for parameter in layer.experts.parameters()]
        results.append([out.detach(), x.grad, weights.grad, *grads])
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-5)


def test_bf16_outputs_of_several_experts_are_summed_in_fp32():
    torch.manual_seed(0)
    dispatcher = LocalDispatcher(8)
    experts = MoELayer(16, MoEConfig(num_experts=8, top_k=8, ffn_hidden=8), dispatcher).experts
    x, ids = torch.randn(40, 16).bfloat16(), torch.arange(8).expand(40, 8)
    weights = torch.rand(40, 8)
    together = experts(*dispatcher.dispatch(x, ids, weights))
    alone = [experts(*dispatcher.dispatch(x, ids[:, e : e + 1], weights[:, e : e + 1])) for e in range(8)]
    assert torch.equal(together, sum(out.float() for out in alone).bfloat16())


def test_bf16_autocast_stays_near_fp32_and_sends_half_the_bytes():
    torch.manual_seed(0)
    layer = MoELayer(32, MoEConfig(num_experts=8, top_k=2, ffn_hidden=16), LocalDispatcher(8))
    x = torch.randn(40, 32)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    error = (half.float() - full).norm() / full.norm()
    assert 0 < error < 2e-2
    write_bias({"router": layer.router}, torch.zeros(8))
