"""The size of a model, counted on the meta device before it is built."""

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import nn

from dispatch.exchange.local import LocalDispatcher
from dispatch.exchange.placement import ExpertPlacement
from dispatch.experts.stacked import expert_parameters
from runtime.settings.config import TrainConfig
from workers.model.decoder import Decoder
from workers.model.loss import logits_at_once
from workers.model.meta_device import meta_device
from workers.model.model_config import ModelConfig
from workers.record.score_log import SCORE_BYTES
from workers.training.optimizer import OptimConfig, is_hidden_matrix

FP32 = 4  # Bytes of a weight and of its gradient. run.dtype is only the dtype of matmuls (autocast).


@dataclass(frozen=True)
class ModelSize:
    """Parameters of the whole model, parameters that are active for one token, and bytes of a checkpoint."""

    total: int
    active: int
    checkpoint_bytes: int


class Cast(NamedTuple):
    """Elements of the weights of dense matmuls, by part of the model. moe: shared experts and others in MoE layers."""

    attention: int
    moe: int
    others: int


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of elements, by their use.

    Attributes:
        dense: of all parameters but routed experts; every rank has them.
        experts: of the routed experts of all ranks.
        cast: of the dense weights that autocast casts for a matmul, and keeps for backward. The head is not among them.
        head: of the head, if it has a weight of its own and does not share the embedding's.
        largest_dense: of the largest dense tensor.
        dense_shapes: shape of every dense tensor.
        matrix_shapes: shapes of the hidden matrices among them, which an optimizer such as Muon treats differently.
        root: of embedding, last norm and head, which `fully_shard` gathers together as the root module.
        largest_block: of the dense parameters of the largest block.
        expert_vectors: of the biases of routed experts.
    """

    dense: int
    experts: int
    cast: Cast
    head: int
    largest_dense: int
    dense_shapes: tuple[tuple[int, ...], ...]
    matrix_shapes: tuple[tuple[int, ...], ...]
    root: int
    largest_block: int
    expert_vectors: int

    @property
    def dense_matrices(self) -> int:
        """Elements of the dense hidden matrices."""
        return sum(map(prod, self.matrix_shapes))

    def experts_per_rank(self, config: ModelConfig, ep_size: int) -> int:
        """Elements of the routed experts of the rank that holds most experts."""
        num_experts = config.moe.num_experts
        return self.experts * max(ExpertPlacement(num_experts, ep_size).num_local_experts) // num_experts


@functools.lru_cache(maxsize=4)  # `trimtab plan` asks several times, and building 60 layers takes a moment
def count_parameters(
    config: ModelConfig, *, trained_only: bool = False, layers: tuple[range, ...] | None = None
) -> ParameterCounts:
    """Count the elements of a model, which is built on the meta device and so needs no memory.

    trained_only: leave out the parameters that `model.lora` freezes. layers: those of one pipeline rank; None is all.
    """
    with meta_device():
        model = Decoder(config, lambda: LocalDispatcher(config.moe.num_experts), layers=layers)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trained_only
    }
    expert_sizes = {name: prod(shapes.pop(name)) for name in expert_parameters(model) if name in shapes}
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    parameters = dict(model.named_parameters())
    units: dict[str, int] = defaultdict(int)  # by module that `fully_shard` gathers at once; "" is the root
    for name, size in sizes.items():
        first, second, *_ = name.split(".")
        units[f"{first}.{second}" if first == "layers" else "mtp" if first == "mtp" else ""] += size
    linear = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = linear.pop("lm_head", 0)
    return ParameterCounts(
        dense=sum(sizes.values()),
        experts=sum(expert_sizes.values()),
        cast=_cast(linear),
        head=head,
        largest_dense=max(sizes.values(), default=0),
        dense_shapes=tuple(shapes.values()),
        matrix_shapes=tuple(shape for name, shape in shapes.items() if is_hidden_matrix(name, parameters[name])),
        root=units.pop("", 0),
        largest_block=max(units.values(), default=0),
        expert_vectors=sum(size for name, size in expert_sizes.items() if not is_hidden_matrix(name, parameters[name])),
    )


def _cast(linear: Mapping[str, int]) -> Cast:
    moe = sum(size for name, size in linear.items() if ".moe." in name)
    attention = sum(size for name, size in linear.items() if ".attention." in name)
    return Cast(attention, moe, sum(linear.values()) - attention - moe)


def model_size(config: ModelConfig, optim: OptimConfig) -> ModelSize:
    """Total and active parameters, and the bytes of a checkpoint: weights and optimizer state."""
    counts = count_parameters(config)
    total, trained = counts.dense + counts.experts, count_parameters(config, trained_only=True)
    in_matrices = trained.dense_matrices + trained.experts - trained.expert_vectors
    in_vectors = trained.dense - trained.dense_matrices + trained.expert_vectors
    return ModelSize(
        total=total,
        active=counts.dense + counts.experts * config.moe.top_k // config.moe.num_experts,
        checkpoint_bytes=FP32 * total + optim.entry.state_bytes(in_matrices, in_vectors),
    )


def batch_bytes_at_least(config: TrainConfig) -> int:
    """A lower bound of the memory that a micro-batch needs on a worker: logits of a chunk, and inputs of the layers.

    It serves to refuse what can never fit. `trimtab plan` estimates the real need.
    """
    sequences = config.sequences_per_rank // config.num_micro_batches
    tokens = sequences * -(-config.model.max_seq_len // config.parallel.context)
    inputs = tokens * config.model.hidden * config.model.num_layers
    return FP32 * (inputs + logits_at_once(tokens, config.model.vocab_size))


def recorded_scores_bytes(config: TrainConfig) -> int:
    """Bytes that balance.record writes in a whole run."""
    if not config.balance.record:
        return 0
    num_steps = -(-config.run.steps // config.balance.record)
    num_tokens = config.run.global_batch_size * config.model.max_seq_len
    return num_steps * num_tokens * config.model.num_moe_layers * config.model.moe.num_experts * SCORE_BYTES


def records_bytes(config: TrainConfig) -> int:
    """Bytes that a whole run writes beside its checkpoints. The estimate is a few per cent too high."""
    layers = config.model.num_moe_layers
    # A line of metrics.jsonl has 0.9 KB, and 20 bytes for the number of each layer. load/ has, for each expert, a count
    # of 8 bytes, a bias of 4, and for some laws a statistic.
    step_bytes = 1000 + 20 * layers + 16 * layers * config.model.moe.num_experts
    return config.run.steps * step_bytes + recorded_scores_bytes(config)
