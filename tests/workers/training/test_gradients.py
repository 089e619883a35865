"""Gradients of several ranks against one process on the same global batch."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispatch.config import MoEConfig
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.exchange.placement import ExpertPlacement
from dispatch.experts.stacked import expert_parameters
from tests.ranks import run_ranks
from tests.workers.model.token_loss import token_nll_sum
from workers.distributed.parallel import RankGroups
from workers.distributed.replicas import make_replica_groups
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.model_config import ModelConfig
from workers.training import gradients
from workers.training.gradients import clip_gradients, global_grad_norm, reduce_gradients
from workers.training.optimizer import OptimConfig, build_optimizer

NUM_EXPERTS = 8
GLOBAL_BATCH = 5
OPTIM = OptimConfig(lr=0.01, weight_decay=0.1)
RTOL = 1e-10


def form_groups(rank: int, world_size: int, ep_size: int, num_replicas: int = 1) -> RankGroups:
    """world 4, ep 2:  EP groups {0, 1} {2, 3}, replicas of a shard {0, 2} {1, 3}."""
    runs = [list(range(first, first + ep_size)) for first in range(0, world_size, ep_size)]
    ep_group, _ = dist.new_subgroups_by_enumeration(runs)
    edp_group, _ = dist.new_subgroups_by_enumeration([list(column) for column in zip(*runs, strict=True)])
    assert dist.group.WORLD is not None
    return RankGroups(
        rank=rank,
        world_size=world_size,
        ep_rank=rank % ep_size,
        ep_size=ep_size,
        edp_rank=rank // ep_size,
        edp_size=world_size // ep_size,
        device=torch.device("cpu"),
        world_group=dist.group.WORLD,
        ep_group=ep_group,
        edp_group=edp_group,
        control_group=dist.group.WORLD,
        checkpoint_group=dist.group.WORLD,
        memory_group=dist.group.WORLD,
        replicas=make_replica_groups(num_replicas, world_size, ep_size, "cpu"),
    )


def build(groups: RankGroups, **overrides: Any) -> Decoder:
    config = ModelConfig(
        vocab_size=11,
        hidden=12,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        dense_ffn_hidden=10,
        max_seq_len=8,
        moe=MoEConfig(num_experts=NUM_EXPERTS, top_k=2, ffn_hidden=6),
        **overrides,
    )
    alone = groups.ep_size == 1
    model = Decoder(
        config, lambda: LocalDispatcher(NUM_EXPERTS) if alone else AllToAllDispatcher(NUM_EXPERTS, groups.ep_group)
    )
    init_weights(model, seed=3)
    return model.double()


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(11, (GLOBAL_BATCH, 8), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def train(
    groups: RankGroups, rows: list[int], num_micro: int = 1, num_steps: int = 6, **overrides: Any
) -> dict[str, Tensor | list[float]]:
    """Some clipped AdamW steps on this rank's rows of the global batch.

    Returns the first step's gradients (before clipping), the norms and the final weights, experts cut to single ones.
    """
    model = build(groups, **overrides)
    optimizer = build_optimizer(model, OPTIM)
    first: dict[str, Tensor] = {}
    norms = []
    for step in range(num_steps):
        ids, targets = global_batch(step)
        for part in torch.tensor(rows, dtype=torch.int64).tensor_split(num_micro):
            (token_nll_sum(model(ids[part]), targets[part]) / targets.numel()).backward()
        reduce_gradients(model, groups)
        norms.append(global_grad_norm(model, groups))
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        clip_gradients(model, norms[-1], 0.5 * norms[0])
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    owned = ExpertPlacement(NUM_EXPERTS, groups.ep_size).owned_by(groups.ep_rank)
    experts = expert_parameters(model).keys()
    found: dict[str, Tensor | list[float]] = {"norms": norms}
    for kind, tensors in (("grad", first), ("weight", weights)):
        for name, tensor in tensors.items():
            if name in experts:
                found |= {f"{kind} {name} {i}": row for i, row in zip(owned, tensor, strict=True)}
            else:
                found[f"{kind} {name}"] = tensor
    return found


def train_on_rank(
    rank: int, world_size: int, ep_size: int, rows_of_ranks: list[list[int]], num_micro: int, recompute: str
) -> dict[str, Tensor | list[float]]:
    groups = form_groups(rank, world_size, ep_size)
    return train(groups, rows_of_ranks[rank], num_micro, recompute=recompute)


def one_process() -> dict[str, Tensor | list[float]]:
    return run_ranks(1, train_on_rank, 1, [list(range(GLOBAL_BATCH))], 1, "none")[0]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor | list[float]]:
    return one_process()


@pytest.mark.parametrize(
    ("ep_size", "rows_of_ranks", "num_micro", "recompute"),
    [
        pytest.param(1, [[0, 1, 2, 3, 4]], 3, "none", id="one-rank-micro-batches"),
        pytest.param(2, [[0, 3, 4], [1, 2]], 1, "none", id="ep2"),
        pytest.param(1, [[0, 3, 4], [1, 2]], 2, "none", id="data-parallel"),
        pytest.param(3, [[0, 3], [1, 2, 4], []], 2, "full", id="ep3-uneven-a-rank-without-tokens-recompute"),
        pytest.param(2, [[0], [1, 2], [3], [4]], 1, "none", id="ep2-two-replicas"),
    ],
)
def test_gradients_norm_and_weights_equal_one_process_on_the_global_batch(  # parity 5, B13
    reference: dict[str, Any], ep_size: int, rows_of_ranks: list[list[int]], num_micro: int, recompute: str
) -> None:
    results: list[dict[str, Any]] = run_ranks(
        len(rows_of_ranks), train_on_rank, ep_size, rows_of_ranks, num_micro, recompute
    )
    seen: set[str] = set()
    for found in results:
        assert found["norms"] == results[0]["norms"]  # bit for bit the same on all ranks
        assert found["norms"] == pytest.approx(reference["norms"], rel=RTOL, abs=0)
        for name in found.keys() - {"norms"}:
            scale = reference[name].abs().max().item()
            torch.testing.assert_close(found[name], reference[name], rtol=RTOL, atol=RTOL * scale, msg=name)
        seen |= found.keys()
    assert seen == reference.keys()


class Pair(nn.Module):
    """Two dtypes and a parameter that gets a gradient on rank 0 only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.c = nn.Parameter(torch.zeros(5))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def reduce_pair(rank: int, world_size: int) -> tuple[dict[str, Tensor | None], float]:
    model, groups = Pair(), form_groups(rank, world_size, world_size)
    model.a.grad = torch.full((3,), rank + 1.0)
    model.b.grad = torch.full((2, 2), 10.0 * (rank + 1), dtype=torch.float64)
    if rank == 0:
        model.c.grad = torch.arange(5.0)
    reduce_gradients(model, groups)
    return {n: p.grad for n, p in model.named_parameters()}, global_grad_norm(model, groups)


def test_missing_gradients_take_part_as_zeros_and_dtypes_do_not_mix() -> None:  # B13
    for found, norm in run_ranks(2, reduce_pair):
        assert found["a"] is not None
        assert found["a"].tolist() == [3.0, 3.0, 3.0]
        assert found["b"] is not None
        assert found["b"].tolist() == [[30.0, 30.0], [30.0, 30.0]]
        assert found["c"] is not None
        assert found["c"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert found["frozen"] is None
        assert norm == pytest.approx(math.sqrt(3 * 9 + 4 * 900 + 30), rel=1e-15)


def test_buckets_fill_up_to_their_size_in_the_order_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 40)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 5, 1, 20, 4)]  # 20, 20, 4, 80, 16 bytes
    sizes = [[p.numel() for p in bucket] for bucket in gradients._buckets(parameters)]
    assert sizes == [[5, 5], [1], [20], [4]]


def poison(rank: int, world_size: int, bad_rank: int, where: str, value: float) -> tuple[float, bool]:
    groups = form_groups(rank, world_size, world_size)
    model = build(groups)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if rank == bad_rank:
        gradient = dict(model.named_parameters())[where].grad
        assert gradient is not None
        gradient.view(-1)[-1] = value
    reduce_gradients(model, groups)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = global_grad_norm(model, groups)
    clip_gradients(model, norm, 1.0)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    return norm, all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("where", ["lm_head.weight", "layers.1.moe.experts.gate_up_proj"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_bad_gradient_of_one_rank_makes_the_norm_non_finite_on_all(where: str, value: float) -> None:  # B37
    for norm, unchanged in run_ranks(2, poison, 1, where, value):
        assert not math.isfinite(norm)
        assert unchanged


def one_rank_groups(**overrides: Any) -> Any:
    fields = {"world_size": 1, "ep_size": 1, "edp_size": 1, "device": torch.device("cpu")}
    none = dict.fromkeys(("world_group", "ep_group", "edp_group", "pipeline"))
    return type("Groups", (), {**fields, **none, **overrides})()


def test_large_finite_fp32_gradients_have_a_finite_norm() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.full((2, 2), 1e25)  # its square overflows fp32
    assert global_grad_norm(model, one_rank_groups()) == pytest.approx(2e25, rel=1e-6)


@pytest.mark.parametrize(("max_norm", "expected"), [(10.0, [3.0, 4.0]), (2.5, [1.5, 2.0]), (0.0, [3.0, 4.0])])
def test_clipping_scales_down_only_above_the_limit_and_zero_turns_it_off(
    max_norm: float, expected: list[float]
) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    clip_gradients(model, 5.0, max_norm)
    assert model.weight.grad.tolist() == [expected]
