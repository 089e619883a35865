import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dispatch.balance import (
    LossFreeBalancer,
    bias_checksum,
    layout_of,
    read_bias,
    read_counts,
    reset_counts,
    routers_of,
    write_bias,
)
from dispatch.config import MoEConfig, RouterConfig
from dispatch.exchange.local import LocalDispatcher
from dispatch.laws import LAWS, BalanceConfig
from dispatch.layer import MoELayer
from dispatch.routing.router import Router
from tests.ranks import run_ranks


def _model(num_experts=(4, 6), seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(MoELayer(8, MoEConfig(num_experts=e, top_k=2, ffn_hidden=4), LocalDispatcher(e)) for e in num_experts)
    )


def _train(model, x):
    model(x).square().sum().backward()


def test_layers_of_different_sizes_share_one_vector():  # B9
    model = _model((4, 6))
    layout = layout_of(routers_of(model))
    assert (layout.names, layout.num_experts, layout.total) == (("0.router", "1.router"), (4, 6), 10)
    _train(model, torch.randn(5, 8))
    load = read_counts(routers_of(model))
    assert load.dtype == torch.int64
    assert [load[where].sum().item() for where in layout.slices] == [10, 10]


def test_reading_and_reducing_leaves_the_counters_alone():  # B7
    model = _model()
    _train(model, torch.randn(5, 8))
    load = read_counts(routers_of(model))
    load += 1_000
    assert read_counts(routers_of(model)).sum() == 20


def test_a_model_without_moe_layers_has_an_empty_load():
    routers = routers_of(nn.Linear(2, 2))
    assert read_counts(routers).shape == read_bias(routers).shape == (0,)
    write_bias(routers, torch.zeros(0))


def test_micro_batches_make_one_update():  # B4, P11
    x = torch.randn(32, 8)
    biases = []
    for num_micro in (1, 2, 4):
        model = _model()
        balancer = LossFreeBalancer(model, BalanceConfig(law="sign", rate=0.01))
        for micro in x.chunk(num_micro):
            _train(model, micro)
            assert read_bias(balancer.routers).abs().max() == 0  # not inside the step
        balancer.step()
        biases.append(read_bias(balancer.routers))
    assert biases[0].abs().max() > 0  # B33: the update is wired
    assert torch.equal(biases[0], biases[1])
    assert torch.equal(biases[0], biases[2])


def test_evaluation_between_steps_changes_nothing():  # B3
    x, y = torch.randn(16, 8), torch.randn(16, 8)
    biases = []
    for evaluate in (False, True):
        model = _model()
        balancer = LossFreeBalancer(model, BalanceConfig(law="sign", rate=0.01))
        for batch in (x, y):
            _train(model, batch)
            balancer.step()
            if evaluate:
                model.eval()
                model(torch.randn(64, 8))
                model.train()
                with torch.no_grad():
                    model(torch.randn(64, 8))
        biases.append(read_bias(balancer.routers))
    assert torch.equal(*biases)


def test_a_frozen_router_keeps_its_bias_and_others_move():  # B10, B35
    model = _model((4, 4, 4))
    model[1].router.weight.requires_grad_(False)
    balancer = LossFreeBalancer(model, BalanceConfig(law="sign", rate=0.01))
    for _ in range(3):
        _train(model, torch.randn(16, 8))
        balancer.step()
    moved = [layer.router.expert_bias_E.abs().max().item() > 0 for layer in model]
    assert moved == [True, False, True]
    assert read_counts(balancer.routers).sum() == 0  # also the frozen layer's counter was reset


def test_steps_without_balancing_do_not_pile_up():  # B11
    model = _model((4,))
    off = LossFreeBalancer(model, BalanceConfig(law="none"))
    for _ in range(5):
        _train(model, torch.randn(16, 8))
        off.step()
    on = LossFreeBalancer(model, BalanceConfig(law="sign", rate=0.01))
    _train(model, torch.randn(16, 8))
    assert on.step().sum() == 32


def test_an_overloaded_expert_loses_load_on_the_next_step():  # B20
    model = _model((8,))
    x = torch.randn(400, 8)
    balancer = LossFreeBalancer(model, BalanceConfig(law="sign", rate=0.05))
    _train(model, x)
    first = balancer.step()
    _train(model, x)
    hot = int(first.argmax())
    assert read_counts(balancer.routers)[hot] < first[hot]
    ids_train, _ = model[0].router(x)
    model.eval()
    assert torch.equal(model[0].router(x)[0], ids_train)  # training and inference choose alike


def test_a_long_run_becomes_balanced():  # P15
    model = _model((16,))
    balancer = LossFreeBalancer(model, BalanceConfig(law="sign", rate=0.005))
    x = torch.randn(2000, 8)
    with torch.no_grad():
        model[0].router.weight[0] += 1.0  # a known skew
    loads = []
    for _ in range(150):
        _train(model, x)
        loads.append(balancer.step())
    assert loads[0].max() * 16 / loads[0].sum() - 1 > 0.5
    assert max(load.max() * 16 / load.sum() - 1 for load in loads[-10:]) < 0.15


def test_a_model_without_routers_is_refused():  # B33
    with pytest.raises(ValueError, match="no Router"):
        LossFreeBalancer(nn.Linear(2, 2), BalanceConfig())


def _step_on_ranks(rank, world_size):
    model = _model((4, 6))
    balancer = LossFreeBalancer(model, BalanceConfig(law="sign", rate=0.01), torch.distributed.group.WORLD)
    torch.manual_seed(10 + rank)
    local = []
    for _ in range(3):
        _train(model, torch.randn(4 + 3 * rank, 8))  # ranks differ in data and size
        local.append(read_counts(balancer.routers))
        load = balancer.step()
    reset_counts(balancer.routers)
    return torch.stack(local), load, read_bias(balancer.routers), bias_checksum(read_bias(balancer.routers))


def test_ranks_sum_their_loads_and_agree_on_the_bias():  # B7, P9, P13
    results = run_ranks(3, _step_on_ranks)
    locals_, loads, biases, checksums = zip(*results, strict=True)
    assert not torch.equal(locals_[0], locals_[1])
    for load in loads:
        assert torch.equal(load, sum(part[-1] for part in locals_))
    assert loads[0].sum() == 2 * 2 * (4 + 7 + 10)
    assert len(set(checksums)) == 1
    assert biases[0].abs().max() > 0
    assert bias_checksum(biases[0].clone().index_fill_(0, torch.tensor([3]), 1e-9)) != checksums[0]


def _route_on_ranks(rank, world_size, num_micro):
    """Four steps of every law on this rank's share of one global batch, in micro-batches: states by law."""
    states = {}
    for name in sorted(LAWS):
        torch.manual_seed(0)
        model = nn.ModuleList([Router(8, RouterConfig(num_experts=e, top_k=2)) for e in (4, 6)])
        group = torch.distributed.group.WORLD if world_size > 1 else None
        balancer = LossFreeBalancer(model, BalanceConfig(law=name), group)
        for step in range(4):
            x_TH = torch.randn(24, 8, generator=torch.Generator().manual_seed(step)) + 1
            for share_TH in x_TH.chunk(world_size)[rank].chunk(num_micro):
                for router in model:
                    router(share_TH)
            balancer.step()
        states[name] = balancer.state
    return states


def test_every_law_moves_alike_in_any_layout_of_ranks_and_micro_batches():  # B4, P9, P16
    (alone,) = run_ranks(1, _route_on_ranks, 1)
    for world_size, num_micro in ((1, 3), (2, 1), (3, 2)):
        for states in run_ranks(world_size, _route_on_ranks, num_micro):
            for name, state in states.items():
                assert state.bias_N.equal(alone[name].bias_N), name
                assert all(value.equal(alone[name].extras[key]) for key, value in state.extras.items()), name
                assert name == "none" or state.bias_N.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("law", ["newton", "quantile"])
def test_recompute_counts_a_statistic_once(law, use_reentrant):  # B2
    counts = []
    for recompute in (False, True):
        model = _model((6,))
        balancer = LossFreeBalancer(model, BalanceConfig(law=law))
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
        y.square().sum().backward()
        counts.append(read_counts(balancer.routers))
    assert counts[0].equal(counts[1]) and counts[0][6:].any()
