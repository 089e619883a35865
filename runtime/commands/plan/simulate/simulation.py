"""The time of a training step, part by part, and the memory of the rank that gets most tokens.

The parts run one after the other, as in Trimtab, unless a `Schedule` assumes otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dispatch.exchange.placement import ExpertPlacement
from runtime.commands.plan.activations import FP32, MicroBatch, peak_bytes, saved_bytes, scratch_bytes
from runtime.commands.plan.plan import Plan, make_plan, micro_batch
from runtime.commands.plan.simulate.hardware import Hardware
from runtime.commands.plan.simulate.layer import Exchange, LayerTime, layer_time, with_rows
from runtime.commands.plan.simulate.routing import Factors, balanced
from runtime.commands.plan.simulate.work import Passes, attention_work, dense_work, head_work, router_work
from runtime.commands.plan.subject import Subject
from runtime.commands.plan.traffic import Layout, Links, Traffic
from runtime.settings.config import TrainConfig
from runtime.settings.size import count_parameters
from runtime.settings.states import own_elements, whole_elements
from workers.training.gradients import BUCKET_BYTES

ACCUMULATED_BYTES = 3 * FP32  # read a gradient, read its sum, write the sum
NOTHING = Traffic(Links(0.0, 0.0), Links(0.0, 0.0))
EXCHANGE, EXPERTS, GRADIENTS, BUBBLE = "all-to-all", "routed experts", "gradients", "pipeline bubble"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Assumptions on what overlaps.

    overlap: share of a layer's computation that runs while its exchange does. stages: pipeline stages, over which the
    layers are divided; the ranks of the subject are those of one stage. bubble: share of the step in which a stage
    waits for others.
    """

    overlap: float = 0.0
    stages: int = 1
    bubble: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """One step. parts: seconds by name, in all step_s. peak_bytes: of the rank with most rows, as the plan counts."""

    parts: Mapping[str, float]
    peak_bytes: float
    tokens: int
    num_ranks: int

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_s_per_rank(self) -> float:
        """Tokens per second, divided by the ranks of all stages."""
        return self.tokens / self.step_s / self.num_ranks


class Simulation:
    """A subject on some hardware, asked for the time of its step under any routing."""

    def __init__(
        self,
        subject: Subject,
        hardware: Hardware,
        schedule: Schedule | None = None,
        experts: Literal["fused", "grouped", "looped"] = "fused",
    ) -> None:
        """Plan the subject. experts: how they are computed (`MicroBatch.experts`)."""
        config = subject.config
        self.plan: Plan = make_plan(subject)
        self.hardware, self.schedule = hardware, schedule or Schedule()
        self.world_size = config.cluster.num_workers
        self.ep_size = config.parallel.resolve(self.world_size)
        placement = ExpertPlacement(config.model.moe.num_experts, self.ep_size)
        self.experts_of_ranks = placement.num_local_experts
        self.ranks_per_node = subject.ranks_per_node
        layout = Layout(placement, min(subject.ranks_per_node, self.ep_size))
        batch = micro_batch(config, layout, self.plan.exchange)
        self.batch: MicroBatch = replace(batch, experts=experts)
        self.num_micro = config.num_micro_batches

    @property
    def config(self) -> TrainConfig:
        """The settings of the planned run."""
        return self.plan.subject.config

    @property
    def balanced(self) -> Factors:
        """Factors of a perfectly even load."""
        return balanced(self.config.model.num_moe_layers, self.experts_of_ranks)

    def step(self, factors: Factors | None = None) -> Simulated:
        """Simulate a step. factors: (MoE layers, EP ranks) as of `routing`; None for an even load."""
        factors = self.balanced if factors is None else factors
        parts = self._computed(factors) | self._once_a_step()
        parts[GRADIENTS] = self._exposed_gradients(parts)
        stages, bubble = self.schedule.stages, self.schedule.bubble
        parts = {name: seconds / stages for name, seconds in parts.items()} | {"control": self._control_s(parts)}
        if bubble:
            parts[BUBBLE] = sum(parts.values()) * bubble / (1 - bubble)
        tokens = self.config.run.global_batch_size * self.config.model.max_seq_len
        return Simulated(parts, self.peak_bytes(factors), tokens, self.world_size * stages)

    def peak_bytes(self, factors: Factors) -> float:
        """Peak memory of the rank with most rows over all layers; its scratch is that of its fullest layer."""
        mean, most = float(factors.mean(0).max()), float(factors.max())
        config, counts = self.config.model, self.plan.counts
        # An adapter is two matrices.
        adapters = len(count_parameters(config, trained_only=True).dense_shapes) // 2
        saved = saved_bytes(config, with_rows(self.batch, mean, self.ep_size), counts.cast, num_adapters=adapters)
        scratch = scratch_bytes(config, with_rows(self.batch, most, self.ep_size))
        return self.plan.state_bytes + max(peak_bytes(saved, scratch), self.plan.bucket_bytes)

    def _computed(self, factors: Factors) -> dict[str, float]:
        """Forward and backward of all micro-batches."""
        model, batch = self.config.model, self.batch
        num_layers = model.num_layers + model.num_mtp_layers
        again = model.recompute
        attention = num_layers * self._passes_s(attention_work(model, batch), again in ("attention", "full"))
        dense = model.num_dense_layers * self._passes_s(dense_work(model, batch), again == "full")
        router = model.num_moe_layers * self._passes_s(router_work(model, batch), again in ("experts", "full"))
        layers = [layer_time(model, batch, self.hardware, self.exchange, row, self.world_size) for row in factors]
        # Half of each layer's share for either direction.
        other_compute_s = (attention / max(num_layers, 1) + router / max(len(layers), 1)) / 2
        micro = {
            "attention": attention,
            "dense feed-forward": dense,
            "router and shared experts": router,
            EXPERTS: sum(each.forward_experts + each.backward_experts for each in layers),
            EXCHANGE: sum(self._exposed(each, other_compute_s) for each in layers),
            "head and loss": self._passes_s(head_work(model, batch), recomputed=False),
        }
        if self.hardware.host_s:
            micro["host"] = num_layers * self.hardware.host_s * self.hardware.crowding(self.world_size)
        return {name: self.num_micro * seconds for name, seconds in micro.items()}

    def _exposed(self, layer: LayerTime, other_compute_s: float) -> float:
        """Seconds of exchanges that the layer's computation does not hide. other_compute_s: a pass without experts."""
        overlap = self.schedule.overlap
        forward = max(0.0, layer.forward_exchange - overlap * (layer.forward_experts + other_compute_s))
        return forward + max(0.0, layer.backward_exchange - overlap * (layer.backward_experts + other_compute_s))

    @property
    def exchange(self) -> Exchange:
        """Of one layer of one micro-batch."""
        model, near = self.config.model, min(self.ranks_per_node, self.ep_size)
        share = 1 / (max(model.num_moe_layers, 1) * self.num_micro)
        sent = self.plan.traffic[self.plan.exchange] if self.batch.exchanges else NOTHING
        traffic = Traffic(sent.forward.times(share), sent.backward.times(share))
        return Exchange(traffic, near - 1, self.ep_size - near, model.recompute in ("experts", "full"))

    def _passes_s(self, work: Passes, recomputed: bool) -> float:
        seconds = (1 + recomputed) * work.forward.seconds(self.hardware) + work.backward.seconds(self.hardware)
        return seconds * self.hardware.crowding(self.world_size)

    def _once_a_step(self) -> dict[str, float]:
        """Sums of gradients, and the optimizer with what is added up before."""
        trained = count_parameters(self.config.model, trained_only=True)
        crowding = self.hardware.crowding(self.world_size)
        own = sum(own_elements(self.config, trained))
        whole = sum(whole_elements(self.config, trained))
        # The first micro-batch writes the gradients, the others add to them.
        accumulated = (self.num_micro - 1) * whole * ACCUMULATED_BYTES / self.hardware.memory_bytes_per_s
        return {
            GRADIENTS: crowding * sum(self._reduced_s(name, size) for name, size in self.plan.gradients.items()),
            "optimizer": crowding * (own * self.hardware.update_s + accumulated),
        }

    def _exposed_gradients(self, parts: Mapping[str, float]) -> float:
        """Seconds of gradient sums and gathers that no computation hides.

        Where states are sharded they overlap with the computation of other layers, as in FSDP. Otherwise the sums
        follow the last backward. Where ranks share cores nothing overlaps.
        """
        if self.config.parallel.shard == "none" or self.hardware.cores:
            return parts[GRADIENTS]
        other_compute_s = sum(parts.values()) - parts[GRADIENTS] - parts[EXCHANGE] - parts["optimizer"]
        return max(0.0, parts[GRADIENTS] - other_compute_s)

    def _reduced_s(self, name: str, num_bytes: float) -> float:
        """Seconds of a ring over the ranks that hold the same parameters, bucket by bucket, over their slowest link."""
        num_ranks = self.world_size if name == "dense" else self.world_size // self.ep_size
        spans_nodes = num_ranks > 1 and (name == "experts" or num_ranks > self.ranks_per_node)
        spans_nodes = spans_nodes and self.world_size > self.ranks_per_node
        link = self.hardware.network if spans_nodes else self.hardware.node
        # Bytes as a ring sends them; latency as of a tree, up and down.
        num_buckets = -(-num_bytes // BUCKET_BYTES)
        return self.hardware.reduce_factor * link.seconds(num_bytes, num_buckets * 2 * (num_ranks - 1).bit_length())

    def _control_s(self, parts: Mapping[str, float]) -> float:
        """Seconds of the control round that the backward of the last micro-batch does not hide."""
        hops = (self.world_size - 1).bit_length()
        num_counts = self.config.model.num_moe_layers * self.config.model.moe.num_experts
        # Summed up and down the tree, then the bias down again.
        seconds = 2 * self.hardware.control.seconds(8 * num_counts * hops, hops)
        seconds += self.hardware.control.seconds(4 * num_counts * hops, hops)
        # Backward computes twice what forward does.
        backward = 2 / 3 * sum(parts.values()) / self.num_micro
        return (
            seconds * self.hardware.crowding(self.world_size) if self.hardware.cores else max(0.0, seconds - backward)
        )
