"""What a run with pipeline parallelism cannot have yet, said before anything starts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dispatch.errors import InvalidValue
from workers.gang.pipeline import divide_layers

if TYPE_CHECKING:
    from runtime.settings.config import TrainConfig


def check_pipeline(config: "TrainConfig") -> None:
    """Raises InvalidValue: the layers, micro-batches or other settings do not go with the stages of `config`."""
    pipeline = config.parallel.pipeline
    if pipeline.size == 1:
        return
    batch, num_ranks = config.run.global_batch_size, config.dp_size
    if batch % num_ranks:
        raise InvalidValue(
            f"run.global_batch_size ({batch}) must be a multiple of the workers of a stage ({num_ranks} = "
            f"cluster.num_workers {config.cluster.num_workers} / parallel.pipeline.size {pipeline.size}), which divide "
            f"it among them; {-(-batch // num_ranks) * num_ranks} would do"
        )
    divide_layers(config.model.num_layers, pipeline.num_stages)
    pipeline.check_micro_batches(config.run.num_micro_batches(config.dp_size))
    if reason := next(_reasons(config), None):
        raise InvalidValue(f"parallel.pipeline.size ({pipeline.size}) does not go with {reason}")


def _reasons(config: "TrainConfig") -> Iterator[str]:
    parallel, model, cluster = config.parallel, config.model, config.cluster
    if parallel.shard != "none":
        yield f"parallel.shard {parallel.shard} yet: weights would be gathered once a micro-batch; set it to none"
    if model.tie_embeddings:
        yield "model.tie_embeddings: the first stage and the last one would each hold the matrix; set it to false"
    if model.num_mtp_layers:
        yield (
            f"model.num_mtp_layers ({model.num_mtp_layers}) yet: the last stage would need the embedding of the first; "
            "set it to 0"
        )
    if model.lora.rank:
        yield f"model.lora.rank ({model.lora.rank}) yet: a stage without anything to train ends backward; set it to 0"
    if config.optim.freeze:
        yield f"optim.freeze ({', '.join(config.optim.freeze)}) yet, for the same reason as adapters; leave it empty"
    if config.aux.active:
        yield "auxiliary losses (aux.*) yet: only the last stage has a loss; leave balancing to balance.law"
    if config.balance.record:
        yield f"balance.record ({config.balance.record}) yet: a rank scores the layers of its stage alone; set it to 0"
    if parallel.exchange == "deep_ep":
        yield "parallel.exchange deep_ep yet: several micro-batches are under way at once; choose another exchange"
    bounds = {cluster.min_workers or cluster.num_workers, cluster.max_workers or cluster.num_workers}
    if bounds != {cluster.num_workers}:
        yield (
            "other numbers of workers than cluster.num_workers yet: a smaller gang would have other stages; leave "
            "cluster.min_workers and cluster.max_workers at 0"
        )
