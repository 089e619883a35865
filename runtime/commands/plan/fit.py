"""`trimtab plan --fit`: of the settings with which a rank fits into its device, those that cost a run least."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dispatch.errors import InvalidValue
from runtime.commands.plan.plan import Plan, ep_sizes, make_plan
from runtime.commands.plan.subject import RANKS_OF_A_NODE, Subject, read_subject
from runtime.settings.config import TrainConfig
from workers.distributed.replicas import replica_counts
from workers.model.model_config import Recompute

MAX_WORLD = 1024
OFFLOAD = "offload states"


@dataclass(frozen=True)
class Fit:
    """plan: the first that fits, or the one that takes least. tried: what was changed, and the bytes of a rank then."""

    plan: Plan
    tried: dict[str, float]

    @property
    def options(self) -> str:
        """The settings of the plan as options of `trimtab train` and `trimtab import`."""
        config = self.plan.subject.config
        chosen = {
            "--workers": config.cluster.num_workers,
            "--parallel.ep_size": config.parallel.resolve(config.cluster.num_workers),
            "--parallel.shard": config.parallel.shard,
            "--parallel.replicate": config.parallel.replicate,
            "--parallel.context": config.parallel.context,
            "--parallel.expert_copies": config.parallel.expert_copies,
            "--model.max_seq_len": config.model.max_seq_len,
            "--model.recompute": config.model.recompute,
            "--run.dtype": config.run.dtype,
            "--run.global_batch_size": config.run.global_batch_size,
            "--run.micro_batch_size": config.run.micro_batch_size,
            "--optim.name": config.optim.name,
            "--optim.offload": config.optim.offload,
        }
        return " ".join(f"{name} {value}" for name, value in chosen.items())


def fit_settings(subject: Subject, limit_bytes: float, *, ep_size: int | None) -> Fit:
    """Add one saving after the other to the settings of `subject`, the cheapest first, until a rank fits.

    ep_size: the only one to try; None tries all that the ranks and their nodes allow. Of several EP sizes that fit, the
    one is taken with which a rank sends the fewest bytes.

    Raises:
        InvalidValue: the settings have a pipeline.
    """
    if subject.config.parallel.pipeline.size > 1:
        raise InvalidValue(
            f"--fit knows no pipeline, but parallel.pipeline.size is {subject.config.parallel.pipeline.size}; "
            "leave out --fit, or give --pp 1"
        )
    tried: dict[str, float] = {}
    best: Plan | None = None
    for name, config in _savings(subject.config):
        plans = [_plan_with_ep(subject, config, size) for size in ([ep_size] if ep_size else ep_sizes(subject))]
        least = min(plans, key=lambda plan: plan.peak_bytes)
        best = least if best is None or least.peak_bytes < best.peak_bytes else best
        tried[name] = least.peak_bytes
        if fitting := [plan for plan in plans if plan.peak_bytes <= limit_bytes]:
            return Fit(min(fitting, key=lambda plan: plan.sent_bytes), tried)
    if best is None:
        raise RuntimeError("the settings themselves are always tried")
    return Fit(best, tried)


def smallest_world(given: argparse.Namespace) -> Subject:
    """The config.json of `given` on the fewest ranks on which all savings but offload let it fit: 1, 2, 4 or nodes.

    Raises:
        InvalidValue: it fits on none of at most MAX_WORLD ranks.
    """
    node, limit_bytes = given.ranks_per_node or RANKS_OF_A_NODE, given.memory_gib * 2**30
    for world_size in (*(size for size in (1, 2, 4) if size < node), *range(node, MAX_WORLD + 1, node)):
        num_shares = max(1, world_size // (given.context or 1))
        if (
            (given.batch or world_size) % num_shares
            or world_size % (given.ep or 1)
            or world_size % (given.context or 1)
        ):
            continue
        if (given.replicate or 1) not in replica_counts(world_size, given.ep or world_size):
            continue
        subject = read_subject(argparse.Namespace(**{**vars(given), "world": world_size}))
        # The last saving but offload, which moves all states over the bus in each step: more ranks are tried before it.
        *_, config = (config for name, config in _savings(subject.config) if name != OFFLOAD)
        sizes = [given.ep] if given.ep else ep_sizes(subject)
        if any(_plan_with_ep(subject, config, size).peak_bytes <= limit_bytes for size in sizes):
            return subject
    raise InvalidValue(
        f"--memory-gib ({given.memory_gib:g}) is too little for {given.config} on up to {MAX_WORLD} ranks; take larger "
        "devices, or shorter sequences by --seq-len"
    )


def _savings(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Settings, each with one saving more than those before it: the later, the more it costs beside memory."""
    yield "as given", config
    num_workers = config.cluster.num_workers
    if config.sequences_per_rank > config.num_micro_batches:
        config = replace(config, run=replace(config.run, micro_batch_size=1))
        yield "micro-batches of 1", config
    if config.parallel.expert_copies:  # which need whole states too
        config = replace(config, parallel=replace(config.parallel, expert_copies=0))
        yield "no copies of experts", config
    for shard in ("optimizer", "full"):  # as many bytes as without, then half as many again
        if num_workers > 1 and config.parallel.shard in ("none", "optimizer") and config.parallel.shard != shard:
            config = replace(config, parallel=replace(config.parallel, shard=shard))
            yield f"shard {shard}", config
    # Attention costs least while sequences are short, experts travel once more, all is a third more computation.
    choices: tuple[Recompute, ...] = ("attention", "experts", "full")
    for choice in choices if config.model.recompute == "none" else choices[2:]:
        config = replace(config, model=replace(config.model, recompute=choice))
        yield f"recompute {choice}", config
    if config.optim.name == "adamw":  # rounds moments
        config = replace(config, optim=replace(config.optim, name="adamw_bf16"))
        yield "adamw_bf16", config
    # Last, as every step then moves the states over the bus, and host memory is not known here.
    if config.optim.offload == "none":
        yield OFFLOAD, replace(config, optim=replace(config.optim, offload="states"))


def _plan_with_ep(subject: Subject, config: TrainConfig, ep_size: int) -> Plan:
    return make_plan(replace(subject, config=replace(config, parallel=replace(config.parallel, ep_size=ep_size))))
