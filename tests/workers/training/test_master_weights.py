"""run.dtype bfloat16: parameters are fp32 masters, of which forward and backward see copies in bfloat16, also sharded.

One rank has the whole batch and the others none, so that sums over ranks add zeros and every bit can be compared.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dispatch.config import MoEConfig
from dispatch.exchange.factory import make_dispatcher
from dispatch.experts.stacked import Experts
from tests.ranks import run_ranks
from tests.workers.training.test_gradients import form_groups
from workers.distributed.parallel import RankGroups
from workers.distributed.sharded import local_rows
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.model_config import ModelConfig
from workers.training.gradients import global_grad_norm, reduce_gradients
from workers.training.optimizer import OptimConfig, build_optimizer
from workers.training.sharding import set_sync, shard_states
from workers.training.step import autocast

STEPS, SEQUENCES, NUM_EXPERTS = 4, 4, 8
CONFIG = ModelConfig(
    vocab_size=64,
    hidden=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    dense_ffn_hidden=48,
    max_seq_len=16,
    moe=MoEConfig(num_experts=NUM_EXPERTS, top_k=2, ffn_hidden=16),
)
OPTIM = OptimConfig(lr=0.01, weight_decay=0.1)
LAYOUTS = [("none", 1), ("optimizer", 1), ("full", 1), ("full", 2)]  # sharding and number of replicas, of 4 ranks


def build(groups: RankGroups, shard: str) -> Decoder:
    with torch.device("meta"):
        model = Decoder(CONFIG, lambda: make_dispatcher(NUM_EXPERTS, groups.ep_group, hidden=64, top_k=2))
    shard_states(model, groups, shard, "bfloat16")
    model.to_empty(device="cpu")
    init_weights(model, seed=3)
    return model


def backward(model: nn.Module, groups: RankGroups, sequences: Tensor) -> None:
    with autocast("bfloat16", groups.device, cache_enabled=False):
        loss = model(sequences[:, :-1], targets=sequences[:, 1:]).total
    (loss / (SEQUENCES * 15)).backward()


def batch(step: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (SEQUENCES, 16), generator=torch.Generator().manual_seed(step))


def train(rank: int, world_size: int, layouts: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """By layout this rank's rows of each parameter after the last step; two micro-batches a step."""
    found = []
    for shard, num_replicas in layouts:
        groups = form_groups(rank, world_size, 1, num_replicas)
        model = build(groups, shard)
        updates = build_optimizer(model, OPTIM)
        for step in range(STEPS):
            for micro, part in enumerate(batch(step).chunk(2)):
                set_sync(model, shard, is_last=micro == 1)
                backward(model, groups, part if rank == 0 else part[:0])
            reduce_gradients(model, groups)
            norm = global_grad_norm(model, groups)
            updates.step()
            updates.zero_grad()
        rows = {name: local_rows(parameter) for name, parameter in model.named_parameters()}
        moments = {str(each.dtype) for state in updates.state.values() for each in state.values()}
        kept = {name: (each.clone(), first) for name, (each, first) in rows.items()}
        found.append({"rows": kept, "norm": norm, "moments": moments})
    return found


def train_with_masters(rank: int, world_size: int) -> dict[str, Tensor]:
    """The slow reference: masters apart, from which the weights of matmuls are rounded to bfloat16 in each step."""
    groups = form_groups(rank, world_size, 1)
    masters, working = build(groups, "none"), build(groups, "none")
    updates = build_optimizer(masters, OPTIM)
    pairs = {name: (master, working.get_parameter(name)) for name, master in masters.named_parameters()}
    rounded = matmul_weights(working)
    for step in range(STEPS):
        with torch.no_grad():
            for name, (master, copy) in pairs.items():
                copy.copy_(master.bfloat16() if name in rounded else master)
        for part in batch(step).chunk(2):
            backward(working, groups, part)
        for master, copy in pairs.values():
            master.grad, copy.grad = copy.grad, None
        updates.step()
        updates.zero_grad()
    return {name: parameter.detach() for name, parameter in masters.named_parameters()}


def matmul_weights(model: nn.Module) -> set[str]:
    """All matrices but the embedding and the routers' gates, which stay fp32."""
    kinds = (nn.Linear, Experts)
    of_modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {f"{name}.{each}" for name, module in of_modules.items() for each, _ in module.named_parameters()}


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=map(str, LAYOUTS))
def test_parameters_are_fp32_masters_of_weights_in_bfloat16(index: int) -> None:
    reference = run_ranks(1, train_with_masters)[0]
    by_rank = [found[0] for found in run_ranks(4, train, [LAYOUTS[index]])]
    for found in by_rank:
        assert found["moments"] == {"torch.float32"}
        for name, (rows, first) in found["rows"].items():
            assert rows.dtype == torch.float32
            torch.testing.assert_close(rows, reference[name][first : first + len(rows)], rtol=0, atol=0, msg=name)
