"""Bytes of weights, gradients and optimizer state that a rank keeps from step to step, by the way they are sharded."""

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import NamedTuple

from runtime.settings.config import TrainConfig
from runtime.settings.size import FP32, ParameterCounts, count_parameters
from workers.distributed.pipeline import PipelineConfig
from workers.model.lora import gathers_experts_narrow
from workers.model.model_config import ModelConfig
from workers.training.optimizer import PIECE_BYTES, PIECES_AT_ONCE


class Held(NamedTuple):
    """A number for dense parameters, and one for routed experts: of elements, of bytes, or of ranks that share them."""

    dense: int
    experts: int

    def times(self, factor: int) -> "Held":
        """Both numbers times a factor, such as the bytes of an element."""
        return Held(self.dense * factor, self.experts * factor)


BF16 = 2
GATHERED = "gathered weights and their gradients"
PIECES = "pieces of offloaded states"
COPIES = "copies of hot experts and their gradients"


def whole_elements(config: TrainConfig, counts: ParameterCounts) -> Held:
    """Elements of all parameters that a rank computes with, on the rank with the most experts."""
    return Held(
        counts.dense, counts.experts_per_rank(config.model, config.parallel.resolve(config.cluster.num_workers))
    )


def own_elements(config: TrainConfig, counts: ParameterCounts) -> Held:
    """Elements whose optimizer state a rank keeps, on the rank with the most.

    Sharding divides dense parameters by rows, and stacks of experts by whole experts.
    """
    whole, (_, edp_size) = whole_elements(config, counts), num_owners(config)
    if config.parallel.shard == "none":
        return whole
    dense = own_rows(counts.dense_shapes, config)
    one_expert = counts.experts // config.model.moe.num_experts  # in all layers
    num_stacked = whole.experts // one_expert if one_expert else 0  # experts of a layer
    return Held(dense, -(-num_stacked // edp_size) * one_expert)


def num_owners(config: TrainConfig) -> Held:
    """Ranks among which sharding divides a dense parameter, and an expert, within one replica (parallel.replicate)."""
    num_ranks, num_replicas = config.dp_size, config.parallel.replicate
    edp_size = num_ranks // config.parallel.resolve(config.cluster.num_workers)
    return Held(num_ranks // num_replicas, max(1, edp_size // num_replicas))


def own_rows(shapes: Iterable[tuple[int, ...]], config: TrainConfig) -> int:
    """Elements of dense tensors whose optimizer state the first rank keeps, which has the most."""
    owners = 1 if config.parallel.shard == "none" else num_owners(config).dense
    return sum(-(-rows // owners) * prod(row) for rows, *row in shapes)


def state_bytes(
    config: TrainConfig, counts: ParameterCounts, trained: ParameterCounts | None = None
) -> dict[str, Held]:
    """Bytes on the device, by kind: weights, gradients, optimizer state (or its pieces), and what sharding gathers.

    Weights and gradients are fp32 whatever run.dtype is. What sharding gathers is an upper bound.

    trained: counts of the parameters that have gradients and optimizer state: with adapters, those alone. None counts
    them for the whole model.
    """
    trained = trained or count_parameters(config.model, trained_only=True)
    states = {
        "weights": own_elements(config, counts).times(FP32),
        "gradients": own_elements(config, trained).times(FP32),
    }
    if config.optim.offload == "none":
        states[config.optim.entry.state_label] = _optimizer_bytes(config, trained)
    else:
        states[PIECES] = _pieces(config, trained)
    if config.parallel.shard != "none" and config.cluster.num_workers > 1:
        states[GATHERED] = _gathered(config, counts)
    if config.parallel.expert_copies and config.parallel.resolve(config.cluster.num_workers) > 1:
        states[COPIES] = Held(0, _copied_elements(config, counts) + _copied_elements(config, trained)).times(FP32)
    return states


def host_bytes(config: TrainConfig, trained: ParameterCounts) -> Held:
    """Bytes of the optimizer state in host memory (optim.offload)."""
    return Held(0, 0) if config.optim.offload == "none" else _optimizer_bytes(config, trained)


def _optimizer_bytes(config: TrainConfig, trained: ParameterCounts) -> Held:
    own, optimizer = own_elements(config, trained), config.optim.entry
    in_matrices = own_rows(trained.matrix_shapes, config)
    in_biases = own.experts * trained.expert_vectors // max(trained.experts, 1)
    return Held(
        optimizer.state_bytes(in_matrices, own.dense - in_matrices),
        optimizer.state_bytes(own.experts - in_biases, in_biases),
    )


def _pieces(config: TrainConfig, trained: ParameterCounts) -> Held:
    """Most bytes of offloaded optimizer state on the device at once, counted for the kind of the largest parameter."""
    optimizer, own = config.optim.entry, own_elements(config, trained)
    matrices, num_own = set(trained.matrix_shapes), {shape: own_rows([shape], config) for shape in trained.dense_shapes}
    dense = [
        optimizer.state_bytes(num, 0) if shape in matrices else optimizer.state_bytes(0, num)
        for shape, num in num_own.items()
    ]
    layer = own.experts // max(config.model.num_moe_layers, 1)
    # The largest tensor of a layer's experts is gate and up together, two thirds of them. Of adapters it may be all.
    largest = Held(max(dense, default=0), optimizer.state_bytes(layer if config.model.lora.rank else layer * 2 // 3, 0))
    size = min(PIECES_AT_ONCE * max(PIECE_BYTES, *largest), sum(_optimizer_bytes(config, trained)))
    return Held(size, 0) if largest.dense > largest.experts else Held(0, size)


def _copied_elements(config: TrainConfig, counts: ParameterCounts) -> int:
    """Elements of the copies of experts that a rank may hold, in all layers."""
    return config.parallel.expert_copies * counts.experts // config.model.moe.num_experts


def gathered_expert_bytes(config: TrainConfig) -> int:
    """Bytes of an element of gathered experts; 0 if experts are not sharded."""
    if config.parallel.shard == "none" or num_owners(config).experts == 1:
        return 0
    return BF16 if gathers_experts_narrow(config.run.dtype, config.model.lora) else FP32


def gathered_dense_bytes(config: TrainConfig, counts: ParameterCounts) -> tuple[int, int]:
    """Bytes of all gathered dense parameters (see workers.training.narrow_gather), and of the root unit among them."""
    saved = FP32 - BF16 if config.run.dtype == "bfloat16" else 0
    return FP32 * counts.dense - saved * (sum(counts.cast) + counts.head), FP32 * counts.root - saved * counts.head


def _gathered(config: TrainConfig, counts: ParameterCounts) -> Held:
    """Upper bound of the bytes of gathered weights and unsharded gradients at a time.

    Dense weights may travel in bf16, but are fp32 once they have arrived. Gradients of weights that adapters freeze are
    counted too, although there are none.
    """
    whole, root, block = whole_elements(config, counts), counts.root, counts.largest_block
    size = gathered_expert_bytes(config)
    if not size:
        whole = whole._replace(experts=0)  # An expert that only one rank of a replica holds is not sharded.
    layer = whole.experts // max(config.model.num_moe_layers, 1)
    # The gradients of a unit exist twice for a moment: as backward made them, and as the flat fp32 buffer of the
    # reduce-scatter.
    if config.parallel.shard == "full":  # weights of the root, a block and the next; gradients of the root and a block
        return Held(FP32 * (2 * root + max(4 * block, root)), (2 * size + FP32) * layer)
    if config.num_micro_batches > 1:  # gradients add up in fp32
        return Held(FP32 * (2 * whole.dense + max(block, root)), (size + FP32) * whole.experts + FP32 * layer)
    return Held(FP32 * (whole.dense + root + max(2 * block, root)), size * whole.experts + (size + FP32) * layer)


def training_bytes(config: TrainConfig) -> int:
    """The sum of `state_bytes` and `host_bytes`; with a pipeline, of the rank with the most."""
    pipeline, model = config.parallel.pipeline, config.model
    if pipeline.size == 1:
        return _training_bytes(config, model)
    parts = [tuple(pipeline.layers_of(pp_rank, model.num_layers)) for pp_rank in range(pipeline.size)]
    return max(_training_bytes(stage_config(config, layers), model, layers) for layers in parts)


def _training_bytes(config: TrainConfig, model: ModelConfig, layers: tuple[range, ...] | None = None) -> int:
    counts, trained = (count_parameters(model, trained_only=only, layers=layers) for only in (False, True))
    return sum(map(sum, state_bytes(config, counts, trained).values())) + sum(host_bytes(config, trained))


def stage_config(config: TrainConfig, layers: tuple[range, ...]) -> TrainConfig:
    """The settings of a smaller run without a pipeline: its model is the layers of one pipeline rank.

    Embedding, last norm and head are on some stages only; `count_parameters` with `layers` knows on which.
    """
    model, indices = config.model, [index for part in layers for index in part]
    num_dense = sum(index < model.num_dense_layers for index in indices)
    num_mtp = model.num_mtp_layers if indices[-1] == model.num_layers - 1 else 0
    return replace(
        config,
        model=replace(model, num_layers=len(indices), num_dense_layers=num_dense, num_mtp_layers=num_mtp),
        parallel=replace(config.parallel, pipeline=PipelineConfig()),
        cluster=replace(config.cluster, num_workers=config.dp_size, min_workers=0, max_workers=0),
    )
