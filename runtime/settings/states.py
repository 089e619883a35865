"""Bytes of the states that a rank keeps from step to step, by how they are sharded."""

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
    """Of one kind, in dense parameters and in routed experts: elements, or their bytes."""

    dense: int
    experts: int

    def times(self, factor: int) -> "Held":
        """That many of each, such as bytes of an element."""
        return Held(self.dense * factor, self.experts * factor)


BF16 = 2
GATHERED = "gathered weights and their gradients"
PIECES = "pieces of offloaded states"
COPIES = "copies of hot experts and their gradients"


def whole_elements(config: TrainConfig, counts: ParameterCounts) -> Held:
    """Elements that the rank with most experts computes with."""
    return Held(counts.dense, counts.of_rank(config.model, config.parallel.resolve(config.cluster.num_workers)))


def own_elements(config: TrainConfig, counts: ParameterCounts) -> Held:
    """Elements of which the rank with most keeps the optimizer's state. Rows are shared out, of experts whole ones."""
    whole, (_, edp_size) = whole_elements(config, counts), num_owners(config)
    if config.parallel.shard == "none":
        return whole
    dense = own_rows(counts.dense_shapes, config)
    one_expert = counts.experts // config.model.moe.num_experts  # in all layers
    num_stacked = whole.experts // one_expert if one_expert else 0  # experts of a layer
    return Held(dense, -(-num_stacked // edp_size) * one_expert)


def num_owners(config: TrainConfig) -> Held:
    """Ranks that would share out a dense parameter, and an expert; in one of the replicas where there are several."""
    num_ranks, num_replicas = config.dp_size, config.parallel.replicate
    edp_size = num_ranks // config.parallel.resolve(config.cluster.num_workers)
    return Held(num_ranks // num_replicas, max(1, edp_size // num_replicas))


def own_rows(shapes: Iterable[tuple[int, ...]], config: TrainConfig) -> int:
    """Elements of dense tensors of which the first rank, that with most, keeps the optimizer's state."""
    owners = 1 if config.parallel.shard == "none" else num_owners(config).dense
    return sum(-(-rows // owners) * prod(row) for rows, *row in shapes)


def state_bytes(
    config: TrainConfig, counts: ParameterCounts, trained: ParameterCounts | None = None
) -> dict[str, Held]:
    """On the device: weights, gradients and optimizer state, or pieces of that; and what sharding gathers, at most.

    Weights and gradients are fp32 whatever run.dtype is.
    Gradients and optimizer state are those of the adapters alone where the model has any. trained: those that have
    them; None counts those of the whole model.
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
        states[COPIES] = Held(0, _of_copies(config, counts) + _of_copies(config, trained)).times(FP32)
    return states


def host_bytes(config: TrainConfig, trained: ParameterCounts) -> Held:
    """Of the optimizer's state that lies in host memory."""
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
    """Offloaded state that is on the device at once, at most; told of the kind with the largest parameter."""
    optimizer, own = config.optim.entry, own_elements(config, trained)
    matrices = set(trained.matrix_shapes)
    dense = (
        optimizer.state_bytes(*(rows, 0) if shape in matrices else (0, rows))
        for shape in trained.dense_shapes
        for rows in (own_rows([shape], config),)
    )
    of_layer = own.experts // max(config.model.num_moe_layers, 1)
    # Gate and up are two thirds of a layer's experts; of adapters at most all.
    largest = Held(
        max(dense, default=0), optimizer.state_bytes(of_layer if config.model.lora.rank else of_layer * 2 // 3, 0)
    )
    size = min(PIECES_AT_ONCE * max(PIECE_BYTES, *largest), sum(_optimizer_bytes(config, trained)))
    return Held(size, 0) if largest.dense > largest.experts else Held(0, size)


def _of_copies(config: TrainConfig, counts: ParameterCounts) -> int:
    """Elements of as many copies as a rank may hold, in all layers."""
    return config.parallel.expert_copies * counts.experts // config.model.moe.num_experts


def gathered_expert_bytes(config: TrainConfig) -> int:
    """Of an element of the experts as they are gathered; 0 where they are not sharded."""
    if config.parallel.shard == "none" or num_owners(config).experts == 1:
        return 0
    return BF16 if gathers_experts_narrow(config.run.dtype, config.model.lora) else FP32


def gathered_dense_bytes(config: TrainConfig, counts: ParameterCounts) -> tuple[int, int]:
    """Of the dense parameters as they are gathered (workers.training.narrow_gather), and of the root's among them."""
    saved = FP32 - BF16 if config.run.dtype == "bfloat16" else 0
    return FP32 * counts.dense - saved * (sum(counts.cast) + counts.head), FP32 * counts.root - saved * counts.head


def _gathered(config: TrainConfig, counts: ParameterCounts) -> Held:
    """Bytes of whole weights and gradients at the worst moment. An estimate: not all of it is there at once.

    Dense weights are fp32 again once they have arrived.

    Gradients of a model that adapters freeze are counted too: an upper bound.
    """
    whole, root, block = whole_elements(config, counts), counts.root, counts.largest_block
    size = gathered_expert_bytes(config)
    if not size:
        whole = whole._replace(experts=0)  # experts with one holder in a replica are not sharded
    layer = whole.experts // max(config.model.num_moe_layers, 1)
    # Gradients of a unit are there twice: as backward made them, and flat, as they are sent, in fp32.
    if config.parallel.shard == "full":  # weights of the root, a block and the next; gradients of the root and a block
        return Held(FP32 * (2 * root + max(4 * block, root)), (2 * size + FP32) * layer)
    if config.num_micro_batches > 1:  # gradients add up in fp32
        return Held(FP32 * (2 * whole.dense + max(block, root)), (size + FP32) * whole.experts + FP32 * layer)
    return Held(FP32 * (whole.dense + root + max(2 * block, root)), size * whole.experts + (size + FP32) * layer)


def training_bytes(config: TrainConfig) -> int:
    """All that `state_bytes` counts, and what lies in host memory; of the stage with most where there is a pipeline."""
    pipeline, model = config.parallel.pipeline, config.model
    if pipeline.size == 1:
        return _training_bytes(config, model)
    parts = [tuple(pipeline.layers_of(pp_rank, model.num_layers)) for pp_rank in range(pipeline.size)]
    return max(_training_bytes(of_stage(config, layers), model, layers) for layers in parts)


def _training_bytes(config: TrainConfig, model: ModelConfig, layers: tuple[range, ...] | None = None) -> int:
    counts, trained = (count_parameters(model, trained_only=only, layers=layers) for only in (False, True))
    return sum(map(sum, state_bytes(config, counts, trained).values())) + sum(host_bytes(config, trained))


def of_stage(config: TrainConfig, layers: tuple[range, ...]) -> TrainConfig:
    """The run of the ranks of a stage with its layers alone. Embedding, last norm and head are not of every stage."""
    model, indices = config.model, [index for part in layers for index in part]
    num_dense = sum(index < model.num_dense_layers for index in indices)
    num_mtp = model.num_mtp_layers if indices[-1] == model.num_layers - 1 else 0
    return replace(
        config,
        model=replace(model, num_layers=len(indices), num_dense_layers=num_dense, num_mtp_layers=num_mtp),
        parallel=replace(config.parallel, pipeline=PipelineConfig()),
        cluster=replace(config.cluster, num_workers=config.dp_size, min_workers=0, max_workers=0),
    )
