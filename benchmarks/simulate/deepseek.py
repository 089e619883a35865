"""Simulates DeepSeek-V3's pre-training with its published schedule, and the profile that DeepSeek published.

Settings: arXiv 2412.19437 (sections 3.2, 3.3, 4.2). Profile: github.com/deepseek-ai/profile-data, train.json at
4496024: one H800 of 64, a forward and a backward chunk of 4 MoE layers side by side, an even load, 112 multiprocessors
left to compute. No constant here is chosen by the published hours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.simulate.dual_pipe import Chunk, makespan
from benchmarks.simulate.setups import deepseek_v3, fp8_layer, in_fp8, subject
from runtime.commands.plan.simulate.hardware import PRESETS, Hardware, assumptions, scaled
from runtime.commands.plan.simulate.layer import layer_time
from runtime.commands.plan.simulate.sensitivity import FACTORS
from runtime.commands.plan.simulate.simulation import GRADIENTS, Simulated, Simulation
from runtime.commands.plan.simulate.sweep import factors_of
from runtime.commands.plan.simulate.work import (
    Passes,
    Work,
    attention_work,
    dense_work,
    expert_work,
    head_work,
    linear,
    norm,
    router_work,
)

# 20 of an H800's 132 multiprocessors carry the exchanges (section 3.2.2); the profile's kernels run on 112.
LEFT_TO_COMPUTE = 112 / 132
STAGES, SEQUENCES, PROFILED_LAYERS = 16, 15360, 4


@dataclass(frozen=True)
class Seconds:
    """Seconds of one micro-batch. weights: the part of `backward` in which the gradients of weights are computed."""

    forward: float
    backward: float
    forward_exchange: float
    backward_exchange: float
    weights: float

    def times(self, share: float) -> "Seconds":
        """The seconds of `share` times the layers."""
        return Seconds(*(share * each for each in vars(self).values()))

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(sum(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def chunk(self) -> Chunk:
        """Exchanges are hidden behind the computation of a chunk of the other direction, if there is one."""
        both = max(self.forward + self.backward, self.forward_exchange + self.backward_exchange)
        forward, backward = self.forward + self.forward_exchange, self.backward + self.backward_exchange
        return Chunk(forward=forward, backward=backward, weights=self.weights, both=both)


H800 = in_fp8(PRESETS["h800"], LEFT_TO_COMPUTE)


def simulation_of(hardware: Hardware = H800, sequences: int = SEQUENCES) -> Simulation:
    """The 128 ranks of one stage of 2048 H800: PP 16, EP 64 over 8 nodes, ZeRO-1, fp8."""
    of_stage = subject(deepseek_v3(mtp=1), 128, 64, sequences, 1, shard="optimizer", exchange="node", payload="fp8")
    return Simulation(of_stage, hardware)


def simulate_pretraining(max_vio: float = 0.0, hardware: Hardware = H800, sequences: int = SEQUENCES) -> Simulated:
    """One step of all 16 stages; each is assumed to have 1/16 of all layers and of the head."""
    simulation = simulation_of(hardware, sequences)
    of_stage = whole_model(simulation, max_vio).times(1 / STAGES)
    pipeline = makespan(of_stage.chunk, STAGES, simulation.num_micro)
    full = simulation.num_micro * (of_stage.forward + of_stage.backward)
    # While the pipeline fills and drains, ranks wait, and nothing hides their exchanges.
    parts = {"computation": full, "exchanges and bubble": pipeline - full}
    step = simulation.step()
    parts |= {name: step.parts[name] / STAGES for name in ("optimizer", GRADIENTS)}
    return replace(step, parts=parts, num_ranks=2048)


def simulate_profile() -> Simulated:
    """The profiled part of training: a forward and a backward chunk of 4 MoE layers, whose exchanges are hidden."""
    simulation, seconds = simulation_of(), of_profile()
    model, batch = simulation.config.model, simulation.batch
    work = attention_work(model, batch) + router_work(model, batch) + expert_work(model, batch)
    matmuls = (work.forward + work.backward + recomputed(simulation)).matmuls
    scores, others = (
        PROFILED_LAYERS * sum(each.seconds(H800) for each in matmuls if (each.kind == "attention") == is_attention)
        for is_attention in (True, False)
    )
    parts = {"attention": scores, "other matmuls": others, "passes": seconds.chunk.both - scores - others}
    return Simulated(parts, 0.0, batch.tokens, 1)


def of_profile() -> Seconds:
    """The seconds of the layers of the profile."""
    simulation = simulation_of()
    return moe_layers(simulation).times(PROFILED_LAYERS / simulation.config.model.num_moe_layers)


def moved(max_vio: float = 0.0) -> Iterator[tuple[str, list[Simulated]]]:
    """Names of all assumptions of the hardware, and a step at 0.8 and at 1.2 times each."""
    for name in assumptions(H800):
        yield name, [simulate_pretraining(max_vio, scaled(H800, name, factor)) for factor in FACTORS]


def whole_model(simulation: Simulation, max_vio: float) -> Seconds:
    """The seconds of all layers, that of multi-token prediction included, of embedding and head."""
    model, batch = simulation.config.model, simulation.batch
    dense_layer = attention_work(model, batch) + dense_work(model, batch)
    dense = computed(simulation, dense_layer).times(model.num_dense_layers)
    head = replace(computed(simulation, head_work(model, batch), fp8=False), weights=0.0)  # they come with the loss
    return moe_layers(simulation, max_vio) + dense + head


def moe_layers(simulation: Simulation, max_vio: float = 0.0) -> Seconds:
    """The seconds of all MoE layers."""
    model, batch = simulation.config.model, simulation.batch
    alike = computed(simulation, attention_work(model, batch) + router_work(model, batch))
    experts = computed(simulation, expert_work(model, batch), fp8=False).weights
    found = Seconds(0, 0, 0, 0, 0)
    for row in factors_of(simulation, max_vio):
        time = layer_time(model, batch, simulation.hardware, simulation.exchange, row, simulation.world_size)
        found += alike + Seconds(
            time.forward_experts, time.backward_experts, time.forward_exchange, time.backward_exchange, experts
        )
    return found


def computed(simulation: Simulation, passes: Passes, fp8: bool = True) -> Seconds:
    """The seconds of these passes, without exchanges. fp8: they are a whole layer, with casts and recomputation."""
    hardware = simulation.hardware
    # The gradient of a weight takes as many operations as its product.
    weights = sum(each.seconds(hardware) for each in passes.forward.matmuls if each.kind != "attention")
    casts = fp8_layer(simulation) if fp8 else (0.0, 0.0)
    again = recomputed(simulation).seconds(hardware) if fp8 else 0.0
    forward, backward = passes.forward.seconds(hardware), passes.backward.seconds(hardware)
    return Seconds(forward + casts[0], backward + casts[1] + again, 0.0, 0.0, weights)


def recomputed(simulation: Simulation) -> Work:
    """The work that the backward of a layer computes again: norms and the up-projections of latents (section 3.2.3)."""
    model, tokens = simulation.config.model, simulation.batch.tokens
    sizes, heads = model.latent, model.num_heads
    queries = linear(tokens, sizes.query_rank, heads * (sizes.nope_dim + sizes.rope_dim), 2)
    keys = linear(tokens, sizes.kv_rank, heads * (sizes.nope_dim + sizes.value_dim), 2)
    return (queries + keys + norm(2 * tokens * model.hidden, 2)).forward
