"""How large a model is, before it is built."""

from dataclasses import dataclass

import torch
from torch import nn

from dispatch.dispatcher import LocalDispatcher
from dispatch.experts import expert_parameters
from dispatch.placement import ExpertPlacement
from runtime.config import TrainConfig
from workers.model import Decoder, ModelConfig
from workers.score_log import SCORE_BYTES

# fp32 parameter, gradient and two AdamW moments; a checkpoint holds all but the gradient.
TRAINING_BYTES_PER_PARAMETER = 16
CHECKPOINT_BYTES_PER_PARAMETER = 12


@dataclass(frozen=True)
class ModelSize:
    """Parameters of the whole model and those that one token passes; bytes of a rank's share and of a checkpoint.

    training_bytes_per_rank leaves out activations, which depend on the batch.
    """

    total: int
    active: int
    training_bytes_per_rank: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class ParameterCounts:
    """Elements by what becomes of them.

    dense: on every rank. experts: routed ones of all ranks. cast: of the dense ones, those that a matmul takes in the
    compute dtype. largest_dense: of the largest dense tensor.
    """

    dense: int
    experts: int
    cast: int
    largest_dense: int

    def of_rank(self, config: ModelConfig, ep_size: int) -> int:
        """Expert parameters of the rank that holds most experts."""
        num_experts = config.moe.num_experts
        return self.experts * max(ExpertPlacement(num_experts, ep_size).num_local_experts) // num_experts


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count on the meta device: no memory, a moment."""
    with torch.device("meta"):
        model = Decoder(config, lambda: LocalDispatcher(config.moe.num_experts))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(sizes.pop(name) for name in expert_parameters(model))
    linear = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)]
    if config.tie_embeddings:
        linear.append(model.token_embedding.weight.numel())
    return ParameterCounts(sum(sizes.values()), experts, sum(linear), max(sizes.values()))


def model_size(config: ModelConfig, ep_size: int) -> ModelSize:
    """Total and active parameters, and their bytes."""
    counts = count_parameters(config)
    total = counts.dense + counts.experts
    return ModelSize(
        total=total,
        active=counts.dense + counts.experts * config.moe.top_k // config.moe.num_experts,
        training_bytes_per_rank=TRAINING_BYTES_PER_PARAMETER * (counts.dense + counts.of_rank(config, ep_size)),
        checkpoint_bytes=CHECKPOINT_BYTES_PER_PARAMETER * total,
    )


def batch_bytes_at_least(config: TrainConfig) -> int:
    """What a micro-batch takes of a worker's memory at the very least: logits and their gradient, inputs of the layers.

    A lower bound, for refusing what can never fit; `trimtab plan` counts what is needed.
    """
    workers = config.cluster.num_workers
    sequences = config.run.sequences_per_rank(workers) // config.run.num_micro_batches(workers)
    per_token = 2 * config.model.vocab_size + config.model.hidden * config.model.num_layers
    return sequences * config.model.max_seq_len * per_token * 4


def recorded_scores_bytes(config: TrainConfig) -> int:
    """What balance.record writes in a run from its first step to its last."""
    if not config.balance.record:
        return 0
    num_steps = -(-config.run.steps // config.balance.record)
    num_tokens = config.run.global_batch_size * config.model.max_seq_len
    return num_steps * num_tokens * config.model.num_moe_layers * config.model.moe.num_experts * SCORE_BYTES


def records_bytes(config: TrainConfig) -> int:
    """What a run writes beside its checkpoints, from its first step to its last; a few per cent too much."""
    layers = config.model.num_moe_layers
    # A line of metrics.jsonl: 0.9 KB and a figure for each layer. In load/: count, bias and statistic of each expert.
    of_step = 1000 + 20 * layers + 16 * layers * config.model.moe.num_experts
    return config.run.steps * of_step + recorded_scores_bytes(config)
