"""The shares of an import: each tensor is in that of one rank."""

from typing import Any

import torch.distributed as dist

from dispatch.config import MoEConfig
from tests.ranks import run_ranks
from workers.model.hugging_face.importing import _empty_shard
from workers.model.model_config import ModelConfig

MODEL = ModelConfig(hidden=16, num_layers=2, num_heads=2, moe=MoEConfig(num_experts=5, top_k=2, ffn_hidden=8))


def share_of(rank: int, world_size: int) -> dict[str, int]:
    state, _ = _empty_shard(MODEL, dist.group.WORLD)
    return {name: tensor.nbytes for name, tensor in state.items()}


def test_no_tensor_of_an_import_is_held_twice_and_shares_are_about_equal() -> None:
    shares: list[dict[str, Any]] = run_ranks(3, share_of)
    whole = run_ranks(1, share_of)[0]
    held = [name for share in shares for name in share]
    assert sorted(held) == sorted(whole)
    largest = max(whole.values())
    for share in shares:
        assert sum(share.values()) <= sum(whole.values()) / 3 + largest
