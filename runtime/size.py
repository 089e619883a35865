"""How large a model is, before it is built."""

from dataclasses import dataclass

import torch

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


def model_size(config: ModelConfig, ep_size: int) -> ModelSize:
    """Count on the meta device: no memory, a moment."""
    num_experts, top_k = config.moe.num_experts, config.moe.top_k
    with torch.device("meta"):
        model = Decoder(config, lambda: LocalDispatcher(num_experts))
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for parameter in expert_parameters(model).values())
    largest_shard = experts * max(ExpertPlacement(num_experts, ep_size).num_local_experts) // num_experts
    return ModelSize(
        total=total,
        active=total - experts + experts * top_k // num_experts,
        training_bytes_per_rank=TRAINING_BYTES_PER_PARAMETER * (total - experts + largest_shard),
        checkpoint_bytes=CHECKPOINT_BYTES_PER_PARAMETER * total,
    )


def recorded_scores_bytes(config: TrainConfig) -> int:
    """What balance.record writes in a run from its first step to its last."""
    if not config.balance.record:
        return 0
    num_steps = -(-config.run.steps // config.balance.record)
    num_tokens = config.run.global_batch_size * config.model.max_seq_len
    num_moe_layers = config.model.num_layers - config.model.num_dense_layers
    return num_steps * num_tokens * num_moe_layers * config.model.moe.num_experts * SCORE_BYTES
