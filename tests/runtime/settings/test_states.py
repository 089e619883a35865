"""What a rank keeps from step to step, as torch's storages have it, against what `trimtab plan` says."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import Tensor

from dispatch.config import MoEConfig
from dispatch.exchange.factory import make_dispatcher
from runtime.settings.config import ClusterConfig, TrainConfig
from runtime.settings.size import count_parameters
from runtime.settings.states import COPIES, GATHERED, PIECES, host_bytes, state_bytes
from tests.ranks import run_ranks
from tests.workers.model.token_loss import token_nll_sum
from tests.workers.training.test_gradients import form_groups
from workers.distributed.parallel import ParallelConfig, RankGroups
from workers.distributed.sharded import local_rows
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.lora import LoraConfig
from workers.model.model_config import ModelConfig
from workers.training.gradients import reduce_gradients
from workers.training.offload import HostStates
from workers.training.optimizer import PIECE_BYTES, OptimConfig, build_optimizer
from workers.training.sharding import set_sync, shard_states

MODEL = ModelConfig(
    vocab_size=101,
    hidden=64,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    dense_ffn_hidden=96,
    moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=32),
)
LAYOUTS = [(shard, ep_size, 1, "adamw") for shard in ("none", "optimizer", "full") for ep_size in (1, 2, 4)]
LAYOUTS += [("full", 2, 1, "adamw_bf16"), ("none", 4, 1, "muon"), ("full", 2, 1, "muon")]
LAYOUTS += [("full", ep_size, 2, "adamw") for ep_size in (1, 2, 4)] + [("optimizer", 1, 2, "adamw")]
ADAPTED = replace(MODEL, lora=LoraConfig(rank=4, targets=("attention", "experts", "dense_ffn")))

BIASED = replace(
    MODEL,
    attention_sinks=True,
    out_bias=True,
    moe=replace(MODEL.moe, gate_bias=True, expert_biases=True, swiglu_limit=7.0),
)


def measure(rank: int, world_size: int, model_config: ModelConfig) -> list[dict[str, int]]:
    """By layout the bytes of weights, gradients and moments of this rank after a step."""
    found = []
    for shard, ep_size, num_replicas, optimizer in LAYOUTS:
        groups = form_groups(rank, world_size, ep_size, num_replicas)
        with torch.device("meta"):
            model = Decoder(model_config, lambda groups=groups: make_dispatcher(8, groups.ep_group, hidden=64, top_k=2))
        shard_states(model, groups, shard)
        model.to_empty(device="cpu")
        init_weights(model, seed=0)
        found.append(step(model, groups, shard, OptimConfig(name=optimizer)))
    return found


def step(model: Decoder, groups: RankGroups, shard: str, optim: OptimConfig) -> dict[str, int]:
    optimizer = build_optimizer(model, optim)
    set_sync(model, shard, is_last=True)
    ids = torch.arange(32).view(1, 32)
    token_nll_sum(model(ids), ids).backward()
    reduce_gradients(model, groups)
    offloads = optim.offload == "states"
    (HostStates(model, optimizer, optim.initial_state, PIECE_BYTES) if offloads else optimizer).step()
    parameters = list(model.parameters())
    moments = chain.from_iterable(state.values() for state in optimizer.state.values())
    return {
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes([p.grad for p in parameters if p.requires_grad]),
        optim.entry.state_label: storage_bytes(list(moments)),
    }


def measure_offloaded(rank: int, world_size: int) -> list[dict[str, int]]:
    groups = form_groups(rank, world_size, 2)
    found = []
    for optimizer in ("adamw", "muon"):
        with torch.device("meta"):
            model = Decoder(MODEL, lambda: make_dispatcher(8, groups.ep_group, hidden=64, top_k=2))
        shard_states(model, groups, "full")
        model.to_empty(device="cpu")
        init_weights(model, seed=0)
        found.append(step(model, groups, "full", OptimConfig(name=optimizer, offload="states")))
    return found


def test_a_rank_keeps_its_states_on_the_host() -> None:
    by_rank = run_ranks(4, measure_offloaded)
    for index, optimizer in enumerate(("adamw", "muon")):
        optim = OptimConfig(name=optimizer, offload="states")
        parallel = ParallelConfig(ep_size=2, shard="full")
        config = TrainConfig(model=MODEL, cluster=ClusterConfig(num_workers=4), parallel=parallel, optim=optim)
        measured = max(found[index][optim.entry.state_label] for found in by_rank)
        on_host = sum(host_bytes(config, count_parameters(MODEL)))
        assert measured == pytest.approx(on_host, rel=0.02)
        device = state_bytes(config, count_parameters(MODEL))
        assert optim.entry.state_label not in device
        assert sum(device[PIECES]) == on_host  # all fits into a piece here


def storage_bytes(tensors: list[Tensor]) -> int:
    storages = [local_rows(tensor)[0].untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    "model",
    [MODEL, *(pytest.param(each, marks=pytest.mark.slow) for each in (ADAPTED, BIASED))],
    ids=["whole", "adapters", "biases and sinks"],
)
def test_a_rank_keeps_the_bytes_of_the_plan(model: ModelConfig) -> None:
    by_rank = run_ranks(4, measure, model)
    base = TrainConfig(model=model, cluster=ClusterConfig(num_workers=4))
    for index, (shard, ep_size, num_replicas, optimizer) in enumerate(LAYOUTS):
        parallel = ParallelConfig(ep_size=ep_size, shard=shard, replicate=num_replicas)
        config = replace(base, parallel=parallel, optim=OptimConfig(name=optimizer))
        planned = {name: sum(held) for name, held in state_bytes(config, count_parameters(model)).items()}
        planned.pop(GATHERED, None)
        most = {name: max(found[index][name] for found in by_rank) for name in planned}
        assert most == pytest.approx(planned, rel=0.02), LAYOUTS[index]


def test_copies_of_experts_take_their_weights_and_gradients_in_every_layer() -> None:
    config = TrainConfig(model=MODEL, cluster=ClusterConfig(num_workers=4), parallel=ParallelConfig(expert_copies=2))
    states = state_bytes(config, count_parameters(MODEL))
    assert states[COPIES] == (0, 2 * (3 * 64 * 32) * 2 * 4 * MODEL.num_moe_layers)  # 2 experts: weights and gradients
    alone = replace(config, cluster=ClusterConfig(num_workers=1))
    assert COPIES not in state_bytes(alone, count_parameters(MODEL))
