"""Sharded states against one process, in float64: gradients, norms and weights do not depend on who holds what."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dispatch.balance import read_counts, routers_of
from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.experts.stacked import Experts
from tests.ranks import run_ranks
from tests.workers.training.test_gradients import form_groups
from workers.distributed.parallel import RankGroups
from workers.distributed.sharded import local_rows
from workers.model.decoder import Decoder
from workers.model.freezing import freeze
from workers.model.init import init_weights
from workers.model.lora import LoraConfig
from workers.model.model_config import ModelConfig
from workers.training.aux_losses import AuxLossConfig, AuxLosses
from workers.training.gradients import clip_gradients, global_grad_norm, reduce_gradients
from workers.training.optimizer import OptimConfig, build_optimizer
from workers.training.sharding import set_sync, shard_states

RTOL = 1e-10
NUM_EXPERTS, STEPS, BATCH = 10, 5, 6  # on EP 4: 3, 3, 2 and 2 experts
ROWS = [[0, 5], [1, 2, 3], [], [4]]  # of the global batch, by rank: uneven, and a rank without tokens
NO_AUX = AuxLossConfig()
VOCABULARY = 11  # its rows do not divide by 4
SEQUENCE = AuxLossConfig(loss="sequence", alpha=0.1, z_alpha=0.01)
KINDS = {
    "plain": {},
    "sequence and z-loss": {"aux": SEQUENCE},
    "global batch loss": {"aux": replace(SEQUENCE, loss="global_batch")},
    "tied, frozen attention, MTP": {"tie_embeddings": True, "num_mtp_layers": 1, "frozen": ("attention", "norms")},
    "muon": {"optimizer": "muon"},
    "biases, sinks, clamped experts": {
        "qkv_bias": True,
        "out_bias": True,
        "attention_sinks": True,
        "moe": MoEConfig(
            num_experts=NUM_EXPERTS,
            top_k=2,
            ffn_hidden=6,
            num_shared_experts=0,
            score="softmax",
            gate_bias=True,
            expert_biases=True,
            swiglu_limit=0.5,
        ),
    },
    "adapters": {"lora": LoraConfig(rank=3, alpha=5.0, targets=("attention", "experts", "dense_ffn"))},
    "adapters of experts": {"lora": LoraConfig(rank=2, targets=("experts",))},
}

Found = dict[str, Tensor | list[float]]


def build(groups: RankGroups, shard: str, schedule: ScheduleConfig, frozen: tuple[str, ...], **model: Any) -> Decoder:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        dense_ffn_hidden=10,
        max_seq_len=8,
        **{"moe": MoEConfig(num_experts=NUM_EXPERTS, top_k=2, ffn_hidden=6)} | model,
    )

    def dispatcher() -> Dispatcher:
        one_rank = groups.ep_size == 1
        return LocalDispatcher(NUM_EXPERTS) if one_rank else AllToAllDispatcher(NUM_EXPERTS, groups.ep_group)

    with torch.device("meta"):
        decoder = Decoder(config, dispatcher, schedule).double()
    shard_states(decoder, groups, shard)
    decoder.to_empty(device="cpu")
    init_weights(decoder, seed=3)
    freeze(decoder, frozen)
    return decoder


def loss_of(model: Decoder, ids: Tensor, targets: Tensor) -> Tensor:
    if not model.config.num_mtp_layers:
        return model(ids, targets=targets).total
    loss, further = model(ids, next_ids=targets, targets=targets)
    return loss.total + 0.3 * further.total


def train(
    groups: RankGroups,
    rows: list[int],
    shard: str,
    num_micro: int,
    aux: AuxLossConfig = NO_AUX,
    optimizer: str = "adamw",
    **choices: Any,
) -> Found:
    """Clipped steps on this rank's rows: first gradients, norms, counts, last weights, in parts."""
    model = build(groups, shard, **choices)
    aux_losses = AuxLosses(model, aux, groups.world_group)
    updates = build_optimizer(model, OptimConfig(name=optimizer, lr=0.01, weight_decay=0.1))
    found: Found = {"norms": []}
    for step in range(STEPS):
        tokens = torch.randint(VOCABULARY - 1, (BATCH, 8), generator=torch.Generator().manual_seed(step))
        aux_losses.begin_step()
        parts = torch.tensor(rows, dtype=torch.int64).tensor_split(num_micro)
        for micro, part in enumerate(parts):
            loss = loss_of(model, tokens[part, :-1], tokens[part, 1:]) + aux_losses.take()
            set_sync(model, shard, is_last=micro == num_micro - 1)
            (loss / tokens[:, 1:].numel()).backward()
        reduce_gradients(model, groups)
        found["norms"].append(global_grad_norm(model, groups))
        if step == 0:
            found |= parts_of(model, "grad", {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        clip_gradients(model, found["norms"][-1], 0.5 * found["norms"][0])
        updates.step()
        updates.zero_grad()
    found["counts"] = read_counts(routers_of(model))
    return found | parts_of(model, "weight", dict(model.named_parameters()))


def parts_of(model: Decoder, kind: str, tensors: dict[str, Tensor]) -> Found:
    """What this rank holds, in single experts and in rows."""
    expert_ids = {name: m.expert_ids for name, m in model.named_modules() if isinstance(m, Experts)}
    found: Found = {}
    for name, tensor in tensors.items():
        rows, first = local_rows(tensor)
        ids = expert_ids.get(name.rpartition(".")[0], range(tensor.shape[0]))
        found |= {f"{kind} {name} {i}": row.clone() for i, row in zip(ids[first:], rows, strict=False)}
    return found


def train_all(rank: int, world_size: int, layouts: list[tuple[Any, ...]]) -> list[Found]:
    # ep_size of a layout: alone, or with the number of replicas.
    kinds = sorted({_ep_and_replicas(each[1]) for each in layouts})
    groups = {kind: form_groups(rank, world_size, *kind) for kind in kinds}
    rows = ROWS[rank] if world_size > 1 else list(range(BATCH))
    return [
        train(
            groups[_ep_and_replicas(ep_size)],
            rows,
            shard,
            num_micro,
            recompute=recompute,
            schedule=ScheduleConfig(**schedule),
            **{"frozen": (), **KINDS[kind]},
        )
        for shard, ep_size, recompute, num_micro, schedule, kind in layouts
    ]


def _ep_and_replicas(ep_size: int | tuple[int, int]) -> tuple[int, int]:
    return (ep_size, 1) if isinstance(ep_size, int) else ep_size


def assert_equals_one_process(name: str, by_rank: list[Found], one: Found) -> None:
    # Integers: bit for bit.
    assert torch.equal(sum(found.pop("counts") for found in by_rank), one["counts"]), name
    seen: set[str] = {"counts"}
    for found in by_rank:
        assert found["norms"] == by_rank[0]["norms"], name  # bit for bit the same on all ranks
        assert found["norms"] == pytest.approx(one["norms"], rel=RTOL, abs=0), name
        for part in found.keys() - {"norms"}:
            atol = RTOL * one[part].abs().max().item()
            torch.testing.assert_close(
                found[part], one[part], rtol=RTOL, atol=atol, msg=lambda m, p=part: f"{name}, {p}: {m}"
            )
        seen |= found.keys()
    assert seen == one.keys(), name


PLAIN, CHUNKS, ROUNDS = {}, {"num_chunks": 2}, {"max_rows": 9}
ODD = "tied, frozen attention, MTP"
BIASED = "biases, sinks, clamped experts"
AUX = [
    ("full", 1, "full", 2, PLAIN, "sequence and z-loss"),
    ("optimizer", 2, "experts", 1, CHUNKS, "global batch loss"),
]
ADAPTERS = [("none", ep_size, "none", 2, PLAIN, "adapters") for ep_size in (1, 2, 4)]
ADAPTERS += [("full", 2, "full", 2, CHUNKS, "adapters"), ("full", 1, "none", 2, PLAIN, "adapters of experts")]
# World 4 in two replicas: at EP 1 two ranks share out each expert, at EP 2 each replica has it once, at EP 4 one rank.
REPLICAS = [
    (shard, (ep_size, 2), "none", num_micro, PLAIN, "plain")
    for shard, ep_size, num_micro in product(("optimizer", "full"), (1, 2, 4), (1, 2))
]
REPLICAS += [("full", (1, 2), "full", 2, CHUNKS, ODD), ("optimizer", (2, 2), "none", 2, PLAIN, "sequence and z-loss")]
REPLICAS += [("full", (1, 2), "none", 2, PLAIN, kind) for kind in ("muon", "adapters")]
VARIANTS = [("full", 1, "full", 2, CHUNKS, BIASED), ("full", 2, "none", 1, ROUNDS, BIASED)]
SOME = [("optimizer", 4, "attention", 2, PLAIN, "plain"), ("full", 2, "full", 2, CHUNKS, ODD), *AUX]
SOME += [*VARIANTS, *ADAPTERS, *REPLICAS[1:12:2], *REPLICAS[12:]]  # of the plain ones those in two micro-batches
ALL = [
    (shard, ep_size, recompute, num_micro, PLAIN, "plain")
    for shard, ep_size, recompute, num_micro in product(("optimizer", "full"), (1, 2, 4), ("none", "full"), (1, 2))
] + [
    ("full", 2, "none", 1, ROUNDS, ODD),
    ("full", 2, "experts", 2, CHUNKS, ODD),
    ("full", 1, "attention", 1, PLAIN, ODD),
    ("optimizer", 1, "full", 2, ROUNDS, ODD),
    ("optimizer", 4, "experts", 2, PLAIN, BIASED),
    *AUX,
    *VARIANTS,
    *ADAPTERS,
    *REPLICAS,
]


@pytest.mark.parametrize("layouts", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_any_sharding_trains_the_model_of_one_process(layouts: list[tuple[Any, ...]]) -> None:
    one = run_ranks(1, train_all, [("none", 1, "none", 1, PLAIN, kind) for kind in KINDS])[0]
    by_rank = run_ranks(4, train_all, layouts)
    for index, layout in enumerate(layouts):
        assert_equals_one_process(str(layout), [found[index] for found in by_rank], one[list(KINDS).index(layout[-1])])
