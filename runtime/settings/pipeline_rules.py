"""The rules between pipeline parallelism and the other settings, checked before anything starts."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.config import ClusterConfig
from dispatch.errors import InvalidValue
from dispatch.exchange.local import LocalDispatcher
from workers.distributed.parallel import ParallelConfig
from workers.distributed.pipeline import divide_layers
from workers.model.decoder import Decoder
from workers.model.freezing import part_of
from workers.model.meta_device import meta_device
from workers.model.model_config import ModelConfig
from workers.run_config import RunConfig
from workers.training.aux_losses import AuxLossConfig
from workers.training.optimizer import OptimConfig


@dataclass(frozen=True, kw_only=True)
class PipelineRules:
    """The settings that must be compatible with pipeline stages. record: `balance.record`."""

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig
    cluster: ClusterConfig
    optim: OptimConfig
    aux: AuxLossConfig
    record: int

    def check(self) -> None:
        """Raise InvalidValue if the layers, the micro-batches or other settings are incompatible with the stages."""
        pipeline, num_workers = self.parallel.pipeline, self.cluster.num_workers
        if pipeline.size == 1:
            return
        batch, num_ranks = self.run.global_batch_size, pipeline.ranks_per_stage(num_workers)
        if batch % num_ranks:
            raise InvalidValue(
                f"run.global_batch_size ({batch}) must be a multiple of the workers of a stage ({num_ranks} = "
                f"cluster.num_workers {num_workers} / parallel.pipeline.size {pipeline.size}), which divide it among "
                f"them; {-(-batch // num_ranks) * num_ranks} would do"
            )
        divide_layers(self.model.num_layers, pipeline.num_stages)
        pipeline.check_micro_batches(self.run.num_micro_batches(num_ranks))
        if reason := next(self._reasons(), None):
            raise InvalidValue(f"parallel.pipeline.size ({pipeline.size}) does not go with {reason}")

    def _reasons(self) -> Iterator[str]:
        yield from self._reasons_of_model()
        parallel, cluster = self.parallel, self.cluster
        if parallel.context > 1:
            yield f"parallel.context ({parallel.context}) yet: a stage passes on whole sequences; set it to 1"
        if parallel.exchange == "deep_ep":
            yield "parallel.exchange deep_ep yet: several micro-batches are under way at once; choose another exchange"
        if self.record:
            yield f"balance.record ({self.record}) yet: a rank scores the layers of its stage alone; set it to 0"
        if prompts := self.run.sample_prompts:
            yield f"run.sample_prompts ({len(prompts)}) yet: a rank has the layers of its stage alone; leave it empty"
        bounds = {cluster.min_workers or cluster.num_workers, cluster.max_workers or cluster.num_workers}
        if bounds != {cluster.num_workers}:
            yield (
                "other numbers of workers than cluster.num_workers yet: a smaller gang would have other stages; leave "
                "cluster.min_workers and cluster.max_workers at 0"
            )

    def _reasons_of_model(self) -> Iterator[str]:
        model = self.model
        if (model.lora.rank or self.optim.freeze) and (layers := self._layers_without_training()) is not None:
            yield (
                f"optim.freeze and model.lora.targets that leave nothing to train in a stage, as in that of "
                f"layers {layers.start} to {layers.stop - 1}; freeze less, name more targets, or lower "
                "parallel.pipeline.size"
            )
        if self.aux.active:
            yield "auxiliary losses (aux.*) yet: only the last stage has a loss; leave balancing to balance.law"

    def _layers_without_training(self) -> range | None:
        """The layers of the first stage that has nothing to train; None if every stage has something."""
        config = self.model
        for layers in divide_layers(config.num_layers, self.parallel.pipeline.num_stages):
            with meta_device():
                model = Decoder(config, lambda: LocalDispatcher(config.moe.num_experts), layers=[layers])
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            if all(part_of(name) in self.optim.freeze for name in names):
                return layers
        return None
