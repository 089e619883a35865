"""A replayed step is the recorded one bit for bit, given experts are the slow reference's, and nothing is counted."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dispatch import BalanceConfig, LossFreeBalancer, MoEConfig, MoELayer, Routing, recorded_routing
from dispatch.errors import InvalidValue
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.routing.replay import routing_by_block
from tests.ranks import run_ranks

HIDDEN, NUM_EXPERTS, TOP_K = 8, 6, 3
CONFIG = MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, ffn_hidden=5, num_shared_experts=1, route_scale=1.5)
TOKENS = (7, 4)  # of each rank


def whole_layer(config: MoEConfig = CONFIG) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(HIDDEN, config, LocalDispatcher(NUM_EXPERTS)).double()
    layer.router.expert_bias_E.copy_(torch.linspace(-0.2, 0.2, NUM_EXPERTS))
    return layer


def layer_of(world_size: int, config: MoEConfig = CONFIG) -> MoELayer:
    """The whole layer, or this rank's part of it."""
    whole = whole_layer(config)
    if world_size == 1:
        return whole
    layer = MoELayer(HIDDEN, config, AllToAllDispatcher(NUM_EXPERTS, dist.group.WORLD)).double()
    held, state = layer.experts.expert_ids, whole.state_dict()
    layer.load_state_dict({n: t[held.start : held.stop] if ".experts" in f".{n}" else t for n, t in state.items()})
    return layer


def inputs_of(rank: int) -> tuple[Tensor, Tensor, Routing]:
    """Tokens, what the outputs are multiplied by for the loss, and experts that no router chose."""
    random = torch.Generator().manual_seed(7 + rank)
    x, of_loss = torch.randn(2, TOKENS[rank], HIDDEN, generator=random, dtype=torch.float64)
    ids = torch.rand(TOKENS[rank], NUM_EXPERTS, generator=random).argsort(1)[:, :TOP_K]
    return x.requires_grad_(), of_loss, Routing(ids, torch.rand(TOKENS[rank], TOP_K, generator=random).double())


def gradients(layer: MoELayer, x: Tensor, y: Tensor, of_loss: Tensor) -> dict[str, Tensor | None]:
    """The output and all gradients, which are cleared."""
    (y * of_loss).sum().backward()
    found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    x.grad = None
    return found


def record_and_replay(rank: int, world_size: int, recompute: bool) -> None:
    layer, (x, of_loss, _) = layer_of(world_size), inputs_of(rank)
    balancer = LossFreeBalancer(layer, BalanceConfig(law="adaptive", horizon=10), dist.group.WORLD)
    router, heard = layer.router, list[object]()

    def call(routing: Routing | None = None) -> Tensor:
        options = {"use_reentrant": False} if recompute else {}
        return checkpoint(layer, x, None, routing, **options) if recompute else layer(x, None, routing)

    with recorded_routing(layer) as routings:
        recorded = gradients(layer, x, call(), of_loss)
    assert len(routings) == 1  # also where backward computed the layer again
    assert router.tokens_per_expert_E.sum() == TOKENS[rank] * TOP_K
    balancer.step()
    router.expert_bias_E.add_(torch.linspace(1, -1, NUM_EXPERTS))  # would choose others
    assert not torch.equal(router(x)[0], routings[0].topk_ids_TK)
    router.tokens_per_expert_E.zero_()
    router.statistic_EW.zero_()
    bias = router.expert_bias_E.clone()
    router.observer = router.on_scores = lambda *given: heard.append(given)
    with recorded_routing(layer) as none:
        replayed = gradients(layer, x, call(routings[0]), of_loss)
    assert replayed.keys() == recorded.keys()
    for name, value in recorded.items():
        assert torch.equal(value, replayed[name]), name
    assert not heard and not none
    assert not router.tokens_per_expert_E.any() and not router.statistic_EW.any()
    assert torch.equal(router.expert_bias_E, bias)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_replay_of_a_recorded_step_is_that_step_bit_for_bit_and_counts_nothing(
    world_size: int, recompute: bool
) -> None:
    run_ranks(world_size, record_and_replay, recompute)


def slow(layer: MoELayer, x: Tensor, routing: Routing) -> Tensor:
    """Token by token, expert by expert."""
    logits = x @ layer.router.weight.T
    rows = []
    for token, ids in enumerate(routing.topk_ids_TK.tolist()):
        if routing.topk_weights_TK is None:
            scores = logits[token, ids].sigmoid()
            weights = scores / scores.sum() * layer.config.route_scale
        else:
            weights = routing.topk_weights_TK[token]
        row = layer.shared_experts(x[token])
        for expert_id, weight in zip(ids, weights, strict=True):
            gate, up = (layer.experts.gate_up_proj[expert_id] @ x[token]).chunk(2)
            row = row + weight * (layer.experts.down_proj[expert_id] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def replay_given(rank: int, world_size: int, with_weights: bool) -> None:
    whole, layer, references = whole_layer(), layer_of(world_size), []
    for other in range(world_size):
        whole.router.weight.grad = None  # each rank's own, where experts get the sum
        x, of_loss, routing = inputs_of(other)
        routing = routing if with_weights else replace(routing, topk_weights_TK=None)
        if with_weights:
            routing.topk_weights_TK.requires_grad_()
        y = slow(whole, x, routing)
        (y * of_loss).sum().backward()
        references.append((y.detach(), x.grad, None if not with_weights else routing.topk_weights_TK.grad))
        if other == rank:
            mine = whole.router.weight.grad, routing
    gate_grad, routing = mine
    x, of_loss, _ = inputs_of(rank)
    y_expected, x_grad, weights_grad = references[rank]
    if with_weights:
        routing.topk_weights_TK.grad = None
    found = gradients(layer, x, layer(x, routing=routing), of_loss)
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found["y"], y_expected, **close)
    torch.testing.assert_close(found["x"], x_grad, **close)
    held = slice(layer.experts.expert_ids.start, layer.experts.expert_ids.stop)
    torch.testing.assert_close(found["experts.down_proj"], whole.experts.down_proj.grad[held], **close)
    torch.testing.assert_close(found["experts.gate_up_proj"], whole.experts.gate_up_proj.grad[held], **close)
    if with_weights:
        assert found["router.weight"] is None and gate_grad is None
        torch.testing.assert_close(routing.topk_weights_TK.grad, weights_grad, **close)
    else:
        torch.testing.assert_close(found["router.weight"], gate_grad, **close)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("with_weights", [False, True])
def test_given_experts_compute_what_the_slow_reference_does(world_size: int, with_weights: bool) -> None:
    run_ranks(world_size, replay_given, with_weights)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_are_those_of_the_routers_own_rule(score: str, normalize: bool) -> None:
    layer = layer_of(1, replace(CONFIG, score=score, normalize_weights=normalize))
    x, _, routing = inputs_of(0)
    scores = (x @ layer.router.weight.T).sigmoid() if score == "sigmoid" else (x @ layer.router.weight.T).softmax(1)
    chosen = scores.gather(1, routing.topk_ids_TK)
    weights = 1.5 * (chosen / chosen.sum(1, keepdim=True) if normalize else chosen)
    expected = layer(x, routing=replace(routing, topk_weights_TK=weights))
    torch.testing.assert_close(layer(x, routing=replace(routing, topk_weights_TK=None)), expected)


def test_a_step_of_replays_alone_moves_no_bias() -> None:  # B36
    layer, (x, of_loss, routing) = layer_of(1), inputs_of(0)
    for law in ("adaptive", "sign"):
        balancer = LossFreeBalancer(layer, BalanceConfig(law=law, horizon=10))
        bias = layer.router.expert_bias_E.clone()
        gradients(layer, x, layer(x, routing=routing), of_loss)
        assert balancer.step().sum() == 0
        assert torch.equal(layer.router.expert_bias_E, bias), law


def with_row(row: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda ids: torch.cat([ids[:4], torch.tensor([row]), ids[5:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:-1], "topk_ids_TK of the routing of this layer has shape (6, 3); it must be (7, 3)"),
        (lambda ids: ids[:, :2], "has shape (7, 2); it must be (7, 3)"),
        (lambda ids: ids.int(), "is torch.int32; it must be torch.int64; call .long()"),
        (with_row([0, 6, 1]), "token 4 of the routing of this layer has the experts [0, 6, 1]; they must be different"),
        (with_row([-1, 2, 1]), "token 4 of the routing of this layer has the experts [-1, 2, 1]"),
        (with_row([3, 5, 3]), "has the experts [3, 5, 3]; they must be different ids from 0 to 5"),
    ],
)
def test_experts_that_a_layer_cannot_route_by_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    x, _, routing = inputs_of(0)
    with pytest.raises(InvalidValue, match=re.escape(message)):
        layer_of(1)(x, routing=Routing(change(routing.topk_ids_TK)))


def test_weights_of_another_shape_or_kind_and_too_few_routings_are_refused() -> None:
    x, _, routing = inputs_of(0)
    for weights, message in ((torch.ones(7, 2), "shape (7, 2)"), (torch.ones(7, 3, dtype=torch.int64), "floating")):
        with pytest.raises(InvalidValue, match=re.escape(message)):
            layer_of(1)(x, routing=replace(routing, topk_weights_TK=weights))
    with pytest.raises(InvalidValue, match="routings has 1 entries; this forward calls 2 MoE layers"):
        routing_by_block([routing], num_dense=1, num_moe=2)


def test_the_place_of_a_wrong_routing_is_the_name_of_the_layer() -> None:
    layer, (x, _, routing) = layer_of(1), inputs_of(0)
    layer.name = "layers.3.moe"
    with pytest.raises(InvalidValue, match=r"the routing of layers\.3\.moe has shape"):
        layer(x, routing=Routing(routing.topk_ids_TK[1:]))
