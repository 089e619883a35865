"""The plan: memory of a rank and bytes of a step, from settings alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.registry import BACKENDS, one_row_a_rank
from runtime.commands.plan.activations import (
    FP32,
    MicroBatch,
    Parts,
    peak_bytes,
    saved_bytes,
    scratch_bytes,
    widths_of_keys,
)
from runtime.commands.plan.stages import PlanStage, stages_of
from runtime.commands.plan.subject import Subject
from runtime.commands.plan.traffic import Layout, Traffic, exchange_traffic, gradient_bytes, spread_of
from runtime.settings.config import TrainConfig
from runtime.settings.size import ModelSize, ParameterCounts, count_parameters, model_size
from runtime.settings.states import (
    Held,
    gathered_dense_bytes,
    gathered_expert_bytes,
    host_bytes,
    num_owners,
    own_elements,
    stage_config,
    state_bytes,
    whole_elements,
)
from workers.distributed.exchange_choice import choose_exchange
from workers.distributed.replicas import replica_counts
from workers.training.gradients import BUCKET_BYTES


@dataclass(frozen=True)
class Plan:
    """What the rank that holds most experts would need.

    counts: parameters of its layers, those of all experts. rank_experts: elements of its own routed experts. state,
    on_host: bytes of weights, gradients and optimizer state on the device, and in host memory. saved: bytes kept from
    forward to backward of a micro-batch. scratch: the largest buffers at the loss, and in backward. bucket_bytes: a
    bucket of gradients under way between ranks, after the last backward. traffic: by exchange, those that are possible.
    gradients: bytes that a ring sends to sum those of the dense parameters and of the experts, and to gather their
    weights where they are sharded. keys_bytes: keys and values sent to ranks that share the sequences. stage: of a
    pipeline, that of the rank which needs most memory; None without one.
    """

    subject: Subject
    size: ModelSize
    counts: ParameterCounts
    rank_experts: int
    num_local_experts: int
    state: dict[str, Held]
    on_host: Held
    saved: Parts
    scratch: Parts
    bucket_bytes: float
    exchange: str
    traffic: dict[str, Traffic]
    gradients: dict[str, float]
    keys_bytes: float
    stage: PlanStage | None = None

    @property
    def states(self) -> Held:
        """Weights, gradients and optimizer state, and what sharding gathers."""
        return Held(*(sum(part) for part in zip(*self.state.values(), strict=True)))

    @property
    def state_bytes(self) -> float:
        """Of the dense parameters and the experts together."""
        return sum(self.states)

    @property
    def peak_bytes(self) -> float:
        """Upper bound: state, and the larger of activations with their scratch and a bucket of gradients."""
        return self.state_bytes + max(peak_bytes(self.saved, self.scratch), self.bucket_bytes)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends in a step, over the network and inside the node."""
        between_stages = self.stage.message_bytes if self.stage is not None else 0.0
        of_model = sum(self.gradients.values()) + between_stages + self.keys_bytes
        return self.traffic[self.exchange].total.total + of_model

    def largest_parts(self) -> list[tuple[str, float]]:
        """Names and bytes, the largest first."""
        parts = {
            "dense parameters with gradients and moments": self.states.dense,
            "routed experts with gradients and moments": self.states.experts,
            **{f"activations: {name}": size for name, size in self.saved.items()},
            "scratch": max(self.scratch.values()),
        }
        return sorted(parts.items(), key=lambda part: -part[1])


def make_plan(subject: Subject) -> Plan:
    """Plan the subject by arithmetic alone; of a pipeline, the rank that needs most memory."""
    if stages := stages_of(subject.config):
        return max((plan_of_stage(subject, stage) for stage in stages), key=lambda plan: plan.peak_bytes)
    model = subject.config.model
    return _plan(subject, count_parameters(model), count_parameters(model, trained_only=True))


def plan_of_stage(subject: Subject, stage: PlanStage) -> Plan:
    """The plan of the ranks that hold the layers of this stage."""
    alone = _plan_of_layers(subject, stage.layers)
    size = model_size(subject.config.model, subject.config.optim)
    saved = stage.saved([_plan_of_layers(subject, (layers,)).saved for layers in stage.layers])
    return replace(alone, subject=subject, size=size, stage=stage, saved=saved, scratch=stage.scratch(alone.scratch))


def _plan_of_layers(subject: Subject, layers: tuple[range, ...]) -> Plan:
    model = subject.config.model
    counts, trained = (count_parameters(model, trained_only=only, layers=layers) for only in (False, True))
    return _plan(replace(subject, config=stage_config(subject.config, layers)), counts, trained, in_stages=True)


def _plan(subject: Subject, counts: ParameterCounts, trained: ParameterCounts, *, in_stages: bool = False) -> Plan:
    """Plan a rank from numbers of parameters.

    counts: all parameters of the model, or of the rank's layers. trained: those of them that are trained. in_stages:
    the rank is one of a pipeline.
    """
    config, world_size = subject.config, subject.config.cluster.num_workers
    ep_size = config.parallel.resolve(world_size)
    layout = Layout(ExpertPlacement(config.model.moe.num_experts, ep_size), min(subject.ranks_per_node, ep_size))
    exchange = _exchange(subject)
    batch = micro_batch(config, layout, exchange)
    step_tokens = batch.tokens * config.num_micro_batches
    whole = whole_elements(config, counts)
    return Plan(
        subject=subject,
        size=model_size(config.model, config.optim),
        counts=counts,
        rank_experts=whole.experts,
        num_local_experts=batch.num_local_experts,
        state=state_bytes(config, counts, trained),
        on_host=host_bytes(config, trained),
        # An adapter is two matrices; without adapters the number plays no part.
        saved=saved_bytes(config.model, batch, counts.cast, num_adapters=len(trained.dense_shapes) // 2),
        scratch=scratch_bytes(config.model, batch),
        bucket_bytes=_bucket_bytes(config, trained, batch, world_size),
        exchange=exchange,
        traffic=exchange_traffic(
            config.model,
            layout,
            step_tokens,
            exchange,
            element_bytes=batch.element_bytes,
            payload=config.parallel.payload,
        ),
        gradients=_gradient_bytes(config, counts, trained, in_stages=in_stages),
        keys_bytes=_keys_bytes(config, batch),
    )


def _keys_bytes(config: TrainConfig, batch: MicroBatch) -> float:
    """Bytes that a rank sends in a step to those that share its sequences: keys and values, and their gradients."""
    model = config.model
    # A gather in forward, the gradients in backward, and the gather again where backward computes attention again.
    num_gathers = 2 + (model.recompute in ("attention", "full"))
    num_layers = (model.num_layers + model.num_mtp_layers) * config.num_micro_batches
    per_gather = batch.element_bytes * batch.tokens * widths_of_keys(model) * (config.parallel.context - 1)
    return float(num_layers * num_gathers * per_gather)


def _gradient_bytes(
    config: TrainConfig, counts: ParameterCounts, trained: ParameterCounts, *, in_stages: bool
) -> dict[str, float]:
    """Bytes that a rank sends in a step to sum gradients and, where states are sharded, to gather them.

    Gathered are weights, and whole matrices where the optimizer needs those.
    """
    owners = num_owners(config)
    # What an all-reduce of all elements would send, and one of the trained ones: of dense parameters, of experts. By a
    # ring it is a reduce-scatter and an all-gather, and each of the two sends half of it.
    whole, own = (
        [gradient_bytes(held.dense, owners.dense), gradient_bytes(held.experts, owners.experts)]
        for held in (whole_elements(config, each) for each in (counts, trained))
    )
    if config.parallel.shard == "none":
        return {"dense": own[0], "experts": own[1]}
    gathered, root_bytes = gathered_dense_bytes(config, counts)
    whole[0] *= gathered / (FP32 * counts.dense)
    whole[1] *= gathered_expert_bytes(config) / FP32
    replicas = _replica_bytes(config, trained)
    once = [_matrix_gather_bytes(config, trained) + replicas.dense, replicas.experts]
    if config.parallel.shard == "optimizer":
        return {"dense": (whole[0] + own[0]) / 2 + once[0], "experts": (whole[1] + own[1]) / 2 + once[1]}
    # FSDP: each micro-batch gathers a block for forward and again for backward, and reduces its gradients. The root
    # module is gathered once for both; in a pipeline stage it is gathered and reduced once for all micro-batches.
    num_micro = config.num_micro_batches
    root, of_root = (gradient_bytes(size, owners.dense) for size in (root_bytes // FP32, trained.root))
    blocks, experts = whole[0] - root + (own[0] - of_root) / 2, whole[1] + own[1] / 2
    num_root = 1 if in_stages else num_micro
    dense = num_micro * blocks + num_root * (root + of_root) / 2
    return {"dense": dense + once[0], "experts": num_micro * experts + once[1]}


def _replica_bytes(config: TrainConfig, trained: ParameterCounts) -> Held:
    """Bytes that a rank sends in a step to sum its rows of the gradients over the replicas."""
    own, num_replicas, num_ranks = own_elements(config, trained), config.parallel.replicate, config.cluster.num_workers
    num_expert_replicas = min(num_replicas, num_ranks // config.parallel.resolve(num_ranks))
    return Held(round(gradient_bytes(own.dense, num_replicas)), round(gradient_bytes(own.experts, num_expert_replicas)))


def _matrix_gather_bytes(config: TrainConfig, counts: ParameterCounts) -> float:
    """Bytes that a rank sends to gather matrices for an optimizer that needs them whole: in bf16, on a CPU in fp32."""
    if config.parallel.shard == "none" or not config.optim.entry.gathers_matrices:
        return 0.0
    # A gather sends half of what a sum does, and in bf16 half of that.
    share_of_a_sum = 1 / 2 if config.cluster.device == "cpu" else 1 / 4
    return share_of_a_sum * gradient_bytes(counts.dense_matrices, num_owners(config).dense)


def micro_batch(config: TrainConfig, layout: Layout, exchange: str) -> MicroBatch:
    """What the rank with most experts computes at once under balanced load, on CUDA."""
    model, moe = config.model, config.model.moe
    sequences = config.sequences_per_rank // config.num_micro_batches
    tokens, num_local = sequences * -(-model.max_seq_len // config.parallel.context), max(layout.experts_per_rank)
    alone, spread = len(layout.experts_per_rank) == 1, spread_of(moe, layout)
    # The exchange "node" has no hops where one node holds all ranks: rows then travel as those of "rank".
    last = (BACKENDS[exchange].hops(spread) or one_row_a_rank(spread))[-1]
    is_bf16 = config.run.dtype == "bfloat16"
    element_bytes = 2 if is_bf16 else FP32
    return MicroBatch(
        tokens=tokens,
        seq_len=model.max_seq_len,
        num_local_experts=num_local,
        expert_rows=tokens * moe.top_k * len(layout.experts_per_rank) * num_local / moe.num_experts,
        arrived_rows=tokens * (1.0 if alone else last.rows),
        ids_per_row=moe.top_k if alone else last.ids_per_row,
        element_bytes=element_bytes,
        experts="fused",
        exchanges=not alone,
        casts_experts=is_bf16 and gathered_expert_bytes(config) != element_bytes,
        packed=config.data.has_documents,
        varlen=is_bf16 and not model.attention_sinks,
        context=config.parallel.context,
    )


def ways_out(plan: Plan) -> list[tuple[str, Plan]]:
    """Options that lower the memory of a rank, each with the plan that it gives, then all of them together."""
    config, subject = plan.subject.config, plan.subject
    changes: dict[str, Callable[[TrainConfig], TrainConfig]] = {}
    if config.model.recompute != "full":
        changes["--recompute"] = lambda c: replace(c, model=replace(c.model, recompute="full"))
    if config.sequences_per_rank // config.num_micro_batches > 1:
        changes["--micro-batch 1"] = lambda c: replace(c, run=replace(c.run, micro_batch_size=1))
    if config.parallel.shard != "full" and config.dp_size > 1:
        changes["--shard full"] = lambda c: replace(c, parallel=replace(c.parallel, shard="full"))
    ep_size = max(ep_sizes(subject))
    if ep_size > config.parallel.resolve(config.cluster.num_workers):
        changes[f"--ep {ep_size}"] = lambda c: replace(c, parallel=replace(c.parallel, ep_size=ep_size))
    plans = [(name, make_plan(replace(subject, config=change(config)))) for name, change in changes.items()]
    if len(changes) > 1:
        for change in changes.values():
            config = change(config)
        plans.append((" ".join(changes), make_plan(replace(subject, config=config))))
    return [(name, other) for name, other in plans if other.peak_bytes < plan.peak_bytes]


def _exchange(subject: Subject) -> str:
    """The exchange that a run with these settings would choose."""
    config, world_size = subject.config, subject.config.cluster.num_workers
    nodes = [rank // subject.ranks_per_node for rank in range(world_size)]
    moe = config.model.moe
    sizes = {"num_experts": moe.num_experts, "hidden": config.model.hidden, "top_k": moe.top_k}
    chosen = choose_exchange(config.parallel, nodes, world_size, **sizes).exchange
    return "rank" if chosen == "auto" else chosen  # auto: nothing travels


def _bucket_bytes(config: TrainConfig, counts: ParameterCounts, batch: MicroBatch, world_size: int) -> float:
    """The copy of a bucket of gradients that is summed, or of one larger tensor (workers.training.gradients)."""
    if world_size == 1 or config.parallel.shard != "none":
        return 0.0  # counted with what is gathered
    moe, num_layers = config.model.moe, max(config.model.num_moe_layers, 1)
    stack = 2 * batch.num_local_experts * config.model.hidden * moe.ffn_hidden
    if config.model.lora.rank:  # at most all stacks of a layer
        stack = counts.experts * batch.num_local_experts // (moe.num_experts * num_layers)
    return max(min(BUCKET_BYTES, FP32 * counts.dense), FP32 * max(counts.largest_dense, stack))


def ep_sizes(subject: Subject) -> list[int]:
    """The possible EP sizes: divisors of the world size by which all EP groups lie alike on their nodes."""
    world_size, size = subject.config.dp_size, subject.ranks_per_node
    max_ep_size = min(world_size, subject.config.model.moe.num_experts)
    fitting = [ep for ep in range(1, max_ep_size + 1) if world_size % ep == 0 and (ep % size == 0 or size % ep == 0)]
    return [ep for ep in fitting if subject.config.parallel.replicate in replica_counts(world_size, ep)]


def _pipeline_json(stage: PlanStage) -> dict[str, Any]:
    return {
        "size": stage.config.parallel.pipeline.size,
        "rank": stage.pp_rank,
        "layers": [[part.start, part.stop - 1] for part in stage.layers],
        "in_flight": stage.in_flight,
        "message_bytes": round(stage.message_bytes),
    }


def as_json(plan: Plan, memory_gib: float) -> dict[str, Any]:
    """The plan as JSON values; sizes in bytes."""
    config = plan.subject.config
    return {
        "config": plan.subject.name,
        "world_size": config.cluster.num_workers,
        "ep_size": config.parallel.resolve(config.cluster.num_workers),
        "ranks_per_node": plan.subject.ranks_per_node,
        "global_batch_size": config.run.global_batch_size,
        "micro_batches": config.num_micro_batches,
        "seq_len": config.model.max_seq_len,
        "dtype": config.run.dtype,
        "shard": config.parallel.shard,
        "replicate": config.parallel.replicate,
        "context": config.parallel.context,
        "recompute": config.model.recompute,
        "optimizer": config.optim.name,
        "offload": config.optim.offload,
        "pipeline": None if plan.stage is None else _pipeline_json(plan.stage),
        "notes": list(plan.subject.notes),
        "parameters": {"total": plan.size.total, "active": plan.size.active},
        "parameters_of_rank": {"dense": plan.counts.dense, "experts": plan.rank_experts},
        "state_bytes": {name: held._asdict() for name, held in plan.state.items()},
        "host_bytes": plan.on_host._asdict(),
        "activation_bytes": {name: round(size) for name, size in plan.saved.items()},
        "scratch_bytes": {name: round(size) for name, size in plan.scratch.items()},
        "bucket_bytes": round(plan.bucket_bytes),
        "peak_bytes": round(plan.peak_bytes),
        "memory_gib": memory_gib,
        "fits": plan.peak_bytes <= memory_gib * 2**30,
        "exchange": plan.exchange,
        "all_to_all_bytes": {
            name: {
                way: {"network": round(links.network), "node": round(links.node)}
                for way, links in (("forward", each.forward), ("backward", each.backward))
            }
            for name, each in plan.traffic.items()
        },
        "keys_bytes": round(plan.keys_bytes),
        "gradient_bytes": {name: round(size) for name, size in plan.gradients.items()},
    }
