"""Dense weights of matmuls are gathered in bfloat16, all others in fp32, by one collective of a unit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from benchmarks.sharding import RingBytes
from dispatch.config import MoEConfig
from dispatch.exchange.factory import make_dispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.experts.stacked import expert_parameters
from tests.ranks import RankFailure, run_ranks
from tests.workers.training.test_gradients import form_groups
from workers.model.attention import LatentConfig
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.lora import LoraConfig
from workers.model.model_config import ModelConfig
from workers.training import narrow_gather
from workers.training.sharding import shard_states

NUM_EXPERTS, WORLD = 8, 4
# Nothing divides by 4: ranks have different numbers of rows, and the last ones none of some.
EVERYTHING = ModelConfig(
    vocab_size=13,
    hidden=10,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    dense_ffn_hidden=9,
    max_seq_len=8,
    qkv_bias=True,
    out_bias=True,
    attention_sinks=True,
    attention_gate=True,
    query_key_norm="head",
    post_norms=True,
    num_mtp_layers=1,
    moe=MoEConfig(num_experts=NUM_EXPERTS, top_k=2, ffn_hidden=6, shared_gate=True, gate_bias=True, expert_biases=True),
)
LATENT = replace(
    EVERYTHING,
    attention="latent",
    latent=LatentConfig(query_rank=5, kv_rank=4, nope_dim=4, rope_dim=2, value_dim=3),
    qkv_bias=False,
    out_bias=False,
    attention_sinks=False,
    attention_gate=False,
    query_key_norm="none",
    num_mtp_layers=0,
    tie_embeddings=True,
    head_dim=0,
    lora=LoraConfig(rank=3, targets=("attention", "dense_ffn")),
)
MODELS = {"every kind of parameter": EVERYTHING, "latent attention, tied, adapters": LATENT}


def build(rank: int, world_size: int, config: ModelConfig, num_replicas: int) -> Decoder:
    groups = form_groups(rank, world_size, 1, num_replicas)
    with torch.device("meta"):
        model = Decoder(config, lambda: make_dispatcher(NUM_EXPERTS, groups.ep_group, hidden=10, top_k=2))
    shard_states(model, groups, "full", "bfloat16")
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    with torch.no_grad():  # no norm of ones, which bfloat16 has
        for parameter in model.parameters():
            parameter.add_(0.001)
    return model


def gather(rank: int, world_size: int, config: ModelConfig, num_replicas: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By name the master, whole, and what the units gathered."""
    model = build(rank, world_size, config, num_replicas)
    masters = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return {name: (masters[name], parameter.detach().clone()) for name, parameter in model.named_parameters()}


def matmul_weights(config: ModelConfig) -> set[str]:
    with torch.device("meta"):
        model = Decoder(config, lambda: LocalDispatcher(NUM_EXPERTS))
    found = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return found | set(expert_parameters(model))


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_matmul_weights_arrive_rounded_and_all_else_as_it_is(kind: str, num_replicas: int) -> None:
    config = MODELS[kind]
    rounded = matmul_weights(config)
    for found in run_ranks(WORLD, gather, config, num_replicas):
        assert rounded < found.keys()
        for name, (master, gathered) in found.items():
            expected = master.bfloat16().float() if name in rounded else master
            assert torch.equal(gathered.float(), expected), name
            if name not in rounded:
                assert not torch.equal(master.bfloat16().float(), master), name  # else it would show nothing


def bytes_of_units(rank: int, world_size: int, config: ModelConfig) -> list[tuple[int, int, int]]:
    """Of each dense unit: bytes that are sent, elements of matmuls and of all else, filled up to whole rows."""
    model = build(rank, world_size, config, 1)
    found = []
    for unit in [*model.layers, model]:
        narrow, wide = 0, 0
        for module, name in narrow_gather._sharded_parameters(unit):
            parameter = getattr(module, name)
            size = -(-parameter.shape[0] // world_size) * parameter[0].numel()
            is_narrow = isinstance(module, nn.Linear) and name == "weight"
            narrow, wide = narrow + size * is_narrow, wide + size * (not is_narrow)
        with RingBytes() as counted:
            unit.unshard()
        found.append((counted.by_group_size.total(), narrow, wide))
    return found


def test_a_unit_sends_two_bytes_of_each_matmul_weight_and_four_of_others() -> None:
    for found in run_ranks(WORLD, bytes_of_units, EVERYTHING):
        for sent, narrow, wide in found:
            # An even number of bf16 values from each rank.
            assert sent == (WORLD - 1) * 2 * (2 * wide + narrow + narrow % 2)


def lay_out_otherwise(rank: int, world_size: int) -> None:
    places: Any = narrow_gather._sharded_parameters
    narrow_gather._sharded_parameters = lambda unit: reversed(list(places(unit)))
    try:
        build(rank, world_size, EVERYTHING, 1).unshard()  # type: ignore[operator]
    finally:
        narrow_gather._sharded_parameters = places


def test_another_order_of_parameters_is_noticed() -> None:
    with pytest.raises(RankFailure, match="lays out parameters otherwise"):
        run_ranks(2, lay_out_otherwise)
