"""The settings of a run: the dataclasses of all parts in one, and the rules between the parts."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch

from cluster.config import ClusterConfig
from cluster.ray.local_ray import OBJECT_STORE_BYTES
from dispatch.balance import check_groups
from dispatch.errors import InvalidValue
from dispatch.exchange.local import LocalDispatcher
from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.registry import ExchangeShape
from dispatch.laws import BalanceConfig
from dispatch.routing.statistics import make_statistic
from runtime.settings.pipeline_rules import PipelineRules
from workers.data.text import DataConfig
from workers.data.tokenizer import load_tokenizer
from workers.distributed.exchange_choice import choose_exchange
from workers.distributed.parallel import ParallelConfig
from workers.model.decoder import Decoder
from workers.model.freezing import freeze, freezes_router
from workers.model.meta_device import meta_device
from workers.model.model_config import ModelConfig
from workers.run_config import RunConfig
from workers.training.aux_losses import AuxLossConfig
from workers.training.optimizer import OptimConfig

# Settings that a resumed run must keep, since its directory, checkpoint, position in the data or law state depend on
# them. Everything else may change on resume: more steps, other workers and devices, another learning rate.
FIXED_SETTINGS = (
    "run.name",
    "run.seed",
    "run.global_batch_size",
    "model",
    "data.path",
    "data.suffixes",
    "data.tokenizer",
    "data.val_fraction",
    "data.mix",
    "data.mix_after",
    "data.shift_at",
    "data.format",
    "data.pack_documents",
    "data.chat_template",
    "optim.freeze",
    "optim.name",
    "balance.law",
)
# These may change if the text can be compared by its digest instead (runtime/runs/run_data.py).
PLACES_OF_TEXT = ("data.path", "data.suffixes")
# Settings inside a fixed section that influence no result.
FREE_SETTINGS = ("model.recompute",)
# Default learning rate for weights that were trained before: the default for a new model would destroy them.
FINE_TUNING_LR = 1e-5
MAX_REPORT_BYTES = OBJECT_STORE_BYTES // 2  # the store may still hold the report of the step before


@dataclass(frozen=True, kw_only=True)
class RunBalanceConfig(BalanceConfig):
    """How the selection bias of a run follows the load, and what is recorded for trying other laws on it."""

    record: int = 0
    """Record the router scores of every so many steps, for `trimtab replay`; without a number, of every step; 0 off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.record) is not int or self.record < 0:
            raise InvalidValue(
                f"balance.record ({self.record}) must be a whole number: 1 records every step, 10 each tenth, 0 none"
            )

    @property
    def law_config(self) -> BalanceConfig:
        """The settings of the law, on which all ranks must agree."""
        return BalanceConfig(**{each.name: getattr(self, each.name) for each in fields(BalanceConfig)})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    """Run: length, batch, rhythm, name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model: size and shape of the decoder."""
    balance: RunBalanceConfig = field(default_factory=RunBalanceConfig)
    """Balance: how the selection bias follows the load."""
    aux: AuxLossConfig = field(default_factory=AuxLossConfig)
    """Auxiliary losses: other ways to balance, to compare with; off."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data: the text, and how it becomes tokens."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer: which one, and its learning rate."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallel: how the ranks divide the model."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Cluster: where the ranks run."""

    @property
    def dp_size(self) -> int:
        """Workers that divide the batch among them: all workers, or with a pipeline those of one stage."""
        return self.parallel.pipeline.ranks_per_stage(self.cluster.num_workers)

    @property
    def sequences_per_rank(self) -> int:
        """Sequences of a step on each rank, or on each group of ranks that share sequences."""
        return self.run.sequences_per_rank(self.dp_size, self.parallel.context)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.run.num_micro_batches(self.dp_size, self.parallel.context)

    @property
    def freezes_router(self) -> bool:
        """Whether routers, and so their biases, stay as they are."""
        return freezes_router(self.optim.freeze, self.model.lora.rank)


def cross_check(config: TrainConfig) -> None:
    """Check the rules between sections, before anything starts. Reads the tokenizer file, if there is one.

    Raises:
        InvalidValue: names the settings, their values, the rule between them and a way out.
    """
    world_size = config.cluster.num_workers
    check_pipeline(config)
    ep_size = config.parallel.resolve(world_size)
    _ = config.num_micro_batches  # raises where ranks do not divide the batch
    check_context(config)
    if config.model.num_dense_layers == config.model.num_layers:
        raise InvalidValue(
            f"model.num_dense_layers ({config.model.num_dense_layers}) equals model.num_layers: nothing is left to "
            "balance; lower it, so that at least one layer is a mixture of experts"
        )
    ExpertPlacement(config.model.moe.num_experts, ep_size)  # raises where a rank would hold no expert
    _check_adapters(config)
    _check_trains(config)
    check_groups(config.balance, config.model.moe.num_groups, "the MoE layers")
    _check_vocabulary(config)
    if config.model.num_mtp_layers and config.data.has_documents:
        raise InvalidValue(
            f"model.num_mtp_layers ({config.model.num_mtp_layers}) predicts across the ends of documents, which "
            "data.format chat and data.pack_documents keep apart; set --model.num_mtp_layers 0, or train on plain text"
        )
    _check_device(config.cluster)
    _check_time_limits(config.cluster)
    _check_report(config)
    if config.parallel.backend is not None and ep_size > 1:
        config.parallel.backend.check(_exchange_shape(config, ep_size))
    _check_nodes(config)


def check_pipeline(config: TrainConfig) -> None:
    """Raise InvalidValue if the settings are incompatible with the stages of a pipeline."""
    names = ("run", "model", "parallel", "cluster", "optim", "aux")
    PipelineRules(**{name: getattr(config, name) for name in names}, record=config.balance.record).check()


def check_context(config: TrainConfig) -> None:
    """Raise InvalidValue if the settings are incompatible with sequences that ranks share (parallel.context)."""
    size, seq_len = config.parallel.context, config.model.max_seq_len
    if size == 1:
        return
    if -(-seq_len // size) * (size - 1) >= seq_len:
        raise InvalidValue(
            f"parallel.context ({size}) leaves a rank without tokens of a sequence of model.max_seq_len ({seq_len}); "
            "lower it"
        )
    if config.aux.loss == "sequence":
        raise InvalidValue(
            f"aux.loss 'sequence' needs whole sequences on a rank, and with parallel.context ({size}) no rank has one; "
            "take --aux.loss global_batch, or --parallel.context 1"
        )
    if config.balance.record and seq_len % size:
        raise InvalidValue(
            f"balance.record needs as many tokens on every rank: model.max_seq_len ({seq_len}) must be a multiple of "
            f"parallel.context ({size}), or set --balance.record 0"
        )


def feasible_sizes(config: TrainConfig) -> tuple[int, ...]:
    """Numbers of workers that the run can have, the largest first: those within its bounds that pass `cross_check`.

    `cluster.num_workers` itself must have been checked before.
    """
    cluster = config.cluster
    bounds = range(cluster.min_workers or cluster.num_workers, (cluster.max_workers or cluster.num_workers) + 1)
    return tuple(
        size for size in reversed(bounds) if size == cluster.num_workers or _is_feasible(config, size, adapts=True)
    )


def _is_feasible(config: TrainConfig, num_workers: int, *, adapts: bool) -> bool:
    """Whether `cross_check` accepts the run with this number of workers.

    adapts: whether parallel.ep_size and others may adapt to the number, as in a gang that lost ranks.
    """
    cluster = replace(config.cluster, num_workers=num_workers, min_workers=0, max_workers=0)
    try:
        parallel = config.parallel.resized_to(num_workers) if adapts else config.parallel
        cross_check(replace(config, cluster=cluster, parallel=parallel))
    except InvalidValue:
        return False
    return True


def on_gpus(
    config: TrainConfig, chosen: Collection[str], count_gpus: Callable[[ClusterConfig], int] | None = None
) -> TrainConfig:
    """Fit the settings to the GPUs there are: a worker for each, as far as the other settings allow, in bf16.

    chosen: names of settings that must stay. count_gpus: counts the GPUs of a joined cluster; None: no cluster is
    asked. Without a GPU, and with `device cpu`, the settings are returned as they are.
    """
    cluster = config.cluster
    if cluster.device == "cpu" or cluster.gpus_per_worker is not None:
        return config
    if cluster.address is None:
        gpus = torch.cuda.device_count()
    else:
        gpus = count_gpus(cluster) if count_gpus is not None else 0
    if not gpus:
        return config
    if "cluster.num_workers" not in chosen:
        feasible = (size for size in range(gpus, 0, -1) if _is_feasible(config, size, adapts=False))
        num_workers = next(feasible, max(gpus, cluster.num_workers))
        config = replace(config, cluster=replace(cluster, num_workers=num_workers))
    if "run.dtype" not in chosen and config.cluster.num_workers <= gpus:
        config = replace(config, run=replace(config.run, dtype="bfloat16"))
    return config


def check_resume(saved: TrainConfig, wanted: TrainConfig, *, text_may_move: bool = False) -> None:
    """Refuse to change a setting of FIXED_SETTINGS when a run resumes.

    text_may_move: whether the text may have another path, since it is compared by its digest.

    Raises:
        InvalidValue: names each such setting with both values.
    """
    before, after = flatten(saved), flatten(wanted)
    free = {*FREE_SETTINGS, *(PLACES_OF_TEXT if text_may_move else ())}
    changed = [
        f"{key} (was {before[key]!r}, now {after[key]!r})"
        for key in before
        if before[key] != after[key] and key not in free and _is_fixed(key)
    ]
    if changed:
        raise InvalidValue(f"a resumed run must keep {', '.join(changed)}; leave it as it was, or start a new run")


def check_same_model(model: ModelConfig, stored: ModelConfig, place: str) -> None:
    """Raise InvalidValue if the settings of a model contradict those of its weights, which are `stored` in `place`.

    A run may choose only adapters, recompute, and max_seq_len up to that of the weights.
    """
    if replace(stored, max_seq_len=model.max_seq_len, recompute=model.recompute, lora=model.lora) != model:
        raise InvalidValue(
            f"the settings model.* are those of {place}; only model.max_seq_len, model.recompute and model.lora.* can "
            "be others"
        )
    if model.max_seq_len > stored.max_seq_len:
        raise InvalidValue(f"model.max_seq_len ({model.max_seq_len}) is more than {place} knows ({stored.max_seq_len})")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings below a dataclass by dotted name: {"model.moe.top_k": 4, ...}."""
    flat: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        name = prefix + entry.name
        flat |= flatten(value, f"{name}.") if is_dataclass(value) else {name: value}
    return flat


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_SETTINGS)


def _check_vocabulary(config: TrainConfig) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        if getattr(tokenizer, "eod_is_added", False) and config.model.vocab_size == tokenizer.vocab_size - 1:
            raise InvalidValue(
                f"nothing names the token that ends a text for {config.data.tokenizer}, so one more id than "
                f"model.vocab_size ({config.model.vocab_size}) would be needed; name it as eos_token in a "
                f"tokenizer_config.json beside it, or set --model.vocab_size {tokenizer.vocab_size} for a new model"
            )
        raise InvalidValue(
            f"model.vocab_size ({config.model.vocab_size}) is smaller than the vocabulary of the tokenizer "
            f"{tokenizer.name} ({tokenizer.vocab_size}); set --model.vocab_size {tokenizer.vocab_size}"
        )


def _check_adapters(config: TrainConfig) -> None:
    lora = config.model.lora
    frozen = [part for part in lora.targets if lora.rank and part in config.optim.freeze]
    if frozen:
        raise InvalidValue(
            f"model.lora.targets and optim.freeze both name {', '.join(frozen)}: adapters of a part train it; leave it "
            "out of one of them (what has no adapter is frozen without being named)"
        )


def _check_trains(config: TrainConfig) -> None:
    """Refuse settings that freeze everything. One block of each kind is built on the meta device to find out."""
    if not config.optim.freeze:
        return
    num_dense = min(config.model.num_dense_layers, 1)
    blocks = replace(config.model, num_layers=num_dense + 1, num_dense_layers=num_dense)
    with meta_device():
        model = Decoder(blocks, lambda: LocalDispatcher(blocks.moe.num_experts))
    freeze(model, config.optim.freeze)


def _exchange_shape(config: TrainConfig, ep_size: int) -> ExchangeShape:
    return ExchangeShape(
        num_experts=config.model.moe.num_experts,
        ep_size=ep_size,
        hidden=config.model.hidden,
        top_k=config.model.moe.top_k,
        payload=config.parallel.payload,
        device=config.cluster.device,
        dtype=config.run.dtype,
        runs_here=config.cluster.address is None,  # else the workers' machines are others
    )


def _check_nodes(config: TrainConfig) -> None:
    """Check that the exchange fits where the ranks are. On a joined cluster that is known only once they are placed."""
    backend, fewest = config.parallel.backend, config.cluster.min_workers
    if backend is not None and backend.needs_nodes and not config.parallel.ranks_per_node and fewest:
        raise InvalidValue(
            f"parallel.exchange {config.parallel.exchange} needs ranks on several nodes, and a run that goes on with "
            f"cluster.min_workers ({fewest}) may have all of them on one; take --parallel.exchange auto, which chooses "
            "for each gang anew, or leave cluster.min_workers out"
        )
    if config.cluster.address is None:
        moe, world_size = config.model.moe, config.cluster.num_workers
        sizes = {"num_experts": moe.num_experts, "hidden": config.model.hidden, "top_k": moe.top_k}
        choose_exchange(config.parallel, (0,) * world_size, world_size, **sizes)


def _check_time_limits(cluster: ClusterConfig) -> None:
    # Rank 0 asks the coordinator at most twice in a step; meanwhile the other ranks wait for it in a collective.
    if cluster.collective_timeout_s <= 2 * cluster.coordinator_timeout_s:
        raise InvalidValue(
            f"cluster.collective_timeout_s ({cluster.collective_timeout_s:g}) must be more than twice "
            f"cluster.coordinator_timeout_s ({cluster.coordinator_timeout_s:g}), or a slow coordinator would end the "
            f"run; lower --cluster.coordinator_timeout_s, or set --cluster.collective_timeout_s "
            f"{3 * cluster.coordinator_timeout_s:g}"
        )


def _check_report(config: TrainConfig) -> None:
    """Refuse a law whose report to the coordinator, one object in Ray's store for each step, would be too large."""
    statistic = config.balance.entry.statistic
    if statistic is None:
        return
    width = 1 + make_statistic(statistic).width
    num_bytes = 8 * width * config.model.moe.num_experts * config.model.num_moe_layers
    if num_bytes > MAX_REPORT_BYTES:
        raise InvalidValue(
            f"balance.law {config.balance.law} counts {width} numbers for each of {config.model.moe.num_experts} "
            f"experts in {config.model.num_moe_layers} MoE layers: {num_bytes / 2**20:.0f} MiB a step to the "
            f"coordinator, of at most {MAX_REPORT_BYTES / 2**20:.0f}; use a law that counts less, such as "
            "--balance.law newton or adaptive"
        )


def _check_device(cluster: ClusterConfig) -> None:
    # On a joined cluster the GPUs are on other machines: there the placement of the workers checks it.
    if cluster.device != "cuda" or cluster.address is not None:
        return
    if not torch.cuda.is_available():
        raise InvalidValue(
            "cluster.device is cuda, but torch sees no CUDA device on this machine; use --device cpu, install a CUDA "
            "build of torch, or join a cluster with GPUs by --cluster.address"
        )
    workers, gpus = cluster.min_workers or cluster.num_workers, torch.cuda.device_count()
    if workers * (cluster.gpus_per_worker or 1) > gpus:
        raise InvalidValue(
            f"cluster.device is cuda and {workers} workers need {cluster.gpus_per_worker or 1:g} GPU each, but this "
            f"machine has {gpus}; set --workers {gpus}, use --device cpu, or join a cluster by --cluster.address"
        )
