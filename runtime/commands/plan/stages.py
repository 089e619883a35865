"""What the ranks of a pipeline need: those of a stage as a run of their own, with its layers."""

from dataclasses import dataclass

from runtime.commands.plan.activations import AT_LOSS, FP32, HEAD, Parts
from runtime.settings.config import TrainConfig
from runtime.settings.states import of_stage, own_rows
from workers.gang.pipeline import PipelineConfig

MESSAGES = "messages of other stages"


@dataclass(frozen=True)
class PlanStage:
    """The ranks that hold some of the layers. in_flight: micro-batches whose activations they hold, at most."""

    config: TrainConfig
    pp_rank: int

    @property
    def layers(self) -> tuple[range, ...]:
        """By index in the whole model, of each stage on the rank."""
        return tuple(self._pipeline.layers_of(self.pp_rank, self.config.model.num_layers))

    @property
    def in_flight(self) -> int:
        """Forwards of a stage whose backward is still to come, at most, over the stages of the rank."""
        return self._pipeline.in_flight(self.pp_rank, self.config.num_micro_batches)

    @property
    def alone(self) -> TrainConfig:
        """The run of these ranks with these layers."""
        return of_stage(self.config, self.layers)

    @property
    def has_head(self) -> bool:
        """Whether the last layer of the model is among them."""
        return self.layers[-1].stop == self.config.model.num_layers

    def saved(self, of_micro_batch: Parts) -> Parts:
        """What is kept for backward: of all micro-batches under way, and buffers for what other stages send."""
        held = self.in_flight / len(self.layers)
        kept = {name: held * size for name, size in of_micro_batch.items()}
        kept[HEAD] = of_micro_batch[HEAD] if self.has_head else 0.0
        # torch has buffers for a whole step, and keeps them; and to its end the gradients of what was received.
        return kept | {MESSAGES: self.message_bytes + self.input_gradient_bytes}

    def scratch(self, of_micro_batch: Parts) -> Parts:
        """What is held besides: without a head none at the loss."""
        return of_micro_batch if self.has_head else of_micro_batch | {AT_LOSS: 0.0}

    @property
    def message_bytes(self) -> float:
        """What a rank receives from other stages in a step, and sends to them: activations and their gradients.

        And the gradient of an embedding that first and last stage share.
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


def stages_of(config: TrainConfig) -> list[PlanStage]:
    """Those of each pipeline rank; none without a pipeline."""
    size = config.parallel.pipeline.size
    return [PlanStage(config, pp_rank) for pp_rank in range(size)] if size > 1 else []
