"""Plans each rank of a pipeline as a run of its own, which has only the layers of that rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.commands.plan.activations import AT_LOSS, FP32, HEAD, Parts, total
from runtime.settings.config import TrainConfig
from runtime.settings.states import own_rows, stage_config
from workers.distributed.pipeline import PipelineConfig

MESSAGES, OUTPUTS = "messages of other stages", "outputs of stages"


@dataclass(frozen=True)
class PlanStage:
    """One rank of the pipeline, and the ranks that hold the same layers."""

    config: TrainConfig
    pp_rank: int

    @property
    def layers(self) -> tuple[range, ...]:
        """The layers of each stage on the rank, by their index in the whole model."""
        return tuple(self._pipeline.layers_of(self.pp_rank, self.config.model.num_layers))

    @property
    def in_flight(self) -> int:
        """Most micro-batches whose activations the rank holds at once, summed over its stages."""
        return max(map(sum, self._pipeline.in_flight(self.pp_rank, self.config.num_micro_batches)))

    @property
    def alone(self) -> TrainConfig:
        """The settings of a run that has only these ranks and layers."""
        return stage_config(self.config, self.layers)

    @property
    def has_head(self) -> bool:
        """Whether the last layer of the model is among them."""
        return self.layers[-1].stop == self.config.model.num_layers

    def saved(self, by_stage: Sequence[Parts]) -> Parts:
        """What is kept for backward: of all micro-batches in flight, and buffers for what other stages send.

        by_stage: what each stage of the rank keeps of one micro-batch.
        """
        moments = self._pipeline.in_flight(self.pp_rank, self.config.num_micro_batches)
        kept = max((_kept_at(num_forwards, by_stage) for num_forwards in moments), key=total)
        kept[HEAD] = by_stage[-1][HEAD] if self.has_head else 0.0
        # torch.distributed.pipelining allocates receive buffers for all micro-batches of a step and keeps them, and the
        # gradients of what was received, to the end of the step. A stage also keeps each output that it has sent until
        # its gradient arrives; for the last stage, which sends none, this is an upper bound.
        outputs = self.in_flight * self._activation_bytes / self.config.num_micro_batches
        return kept | {MESSAGES: self.message_bytes + self.input_gradient_bytes, OUTPUTS: outputs}

    def scratch(self, scratch: Parts) -> Parts:
        """Scratch of a micro-batch, without that of the loss where the stage does not have the head."""
        return scratch if self.has_head else scratch | {AT_LOSS: 0.0}

    @property
    def message_bytes(self) -> float:
        """Bytes that a rank exchanges with other stages in a step, in each direction.

        These are activations, their gradients, and the gradient of an embedding that first and last stage share.
        """
        neighbours = sum((part.start > 0) + (part.stop < self.config.model.num_layers) for part in self.layers)
        model = self.config.model
        is_shared = model.shares_embedding and (self.has_head or self.layers[0].start == 0)
        shared = own_rows([(model.vocab_size, model.hidden)], self.alone) if is_shared else 0
        return float(neighbours * self._activation_bytes + FP32 * shared)

    @property
    def input_gradient_bytes(self) -> float:
        """Gradients of the activations that other stages have sent, of a whole step."""
        return float(sum(part.start > 0 for part in self.layers) * self._activation_bytes)

    @property
    def _activation_bytes(self) -> int:
        """What a stage hands on in a step."""
        model = self.config.model
        return FP32 * self.config.sequences_per_rank * model.max_seq_len * model.hidden

    @property
    def _pipeline(self) -> PipelineConfig:
        return self.config.parallel.pipeline


def _kept_at(num_forwards: Sequence[int], by_stage: Sequence[Parts]) -> Parts:
    kept: Parts = {HEAD: 0.0}
    for number, parts in zip(num_forwards, by_stage, strict=True):
        for name, size in parts.items():
            kept[name] = kept.get(name, 0.0) + number * size * (name != HEAD)
    return kept


def stages_of(config: TrainConfig) -> list[PlanStage]:
    """One for each rank of the pipeline; none without a pipeline."""
    size = config.parallel.pipeline.size
    return [PlanStage(config, pp_rank) for pp_rank in range(size)] if size > 1 else []
