"""The same model on more and fewer ranks, with as many tokens on each, and under more and less imbalance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dispatch.errors import InvalidValue
from runtime.commands.plan.plan import ep_sizes
from runtime.commands.plan.simulate.hardware import Hardware
from runtime.commands.plan.simulate.routing import Factors, skewed
from runtime.commands.plan.simulate.simulation import Schedule, Simulated, Simulation
from runtime.commands.plan.subject import Subject

MAX_VIOS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
WORLDS = (8, 64, 512, 2048, 16384)


@dataclass(frozen=True)
class Cost:
    """A step under one imbalance: its seconds, these over a balanced step's, and bytes of the rank with most rows."""

    max_vio: float
    step_s: float
    times_balanced: float
    peak_bytes: float


@dataclass(frozen=True)
class WorldCosts:
    """One world size: its EP size, the balanced step, and the cost of each MaxVio."""

    world_size: int
    ep_size: int
    balanced: Simulated
    costs: tuple[Cost, ...]


def factors_of(simulation: Simulation, max_vio: float) -> Factors:
    """Factors (`routing`) of loads with the same MaxVio in each layer."""
    model = simulation.config.model
    values = [max_vio] * model.num_moe_layers
    return skewed(values, model.moe.num_experts, model.moe.top_k, simulation.experts_of_ranks)


def by_max_vio(simulation: Simulation, max_vios: Sequence[float]) -> WorldCosts:
    """Costs at the world size of the simulation."""
    even = simulation.step()
    costs = []
    for max_vio in max_vios:
        step = simulation.step(factors_of(simulation, max_vio))
        costs.append(Cost(max_vio, step.step_s, step.step_s / even.step_s, step.peak_bytes))
    return WorldCosts(simulation.world_size, simulation.ep_size, even, tuple(costs))


def by_world(
    subject: Subject, hardware: Hardware, schedule: Schedule, worlds: Sequence[int], max_vios: Sequence[float]
) -> list[WorldCosts]:
    """Costs at each world size."""
    return [by_max_vio(Simulation(resized_subject(subject, size), hardware, schedule), max_vios) for size in worlds]


def resized_subject(subject: Subject, world_size: int) -> Subject:
    """The subject on `world_size` ranks: as many sequences a rank as before, and an EP size that is not larger.

    Where all ranks form one EP group they still do, if there are enough experts. The exchange "node" becomes `auto`.

    Raises:
        InvalidValue: the ranks do not fill whole nodes.
    """
    config, before = subject.config, subject.config.cluster.num_workers
    node = min(subject.ranks_per_node, world_size)
    if world_size % node:
        raise InvalidValue(f"--worlds {world_size} must be a multiple of --ranks-per-node ({node})")
    ep_before = config.parallel.resolve(before)
    max_ep_size = world_size if ep_before == before else ep_before
    backend = config.parallel.backend
    exchange = "auto" if backend is not None and backend.needs_nodes else config.parallel.exchange
    parallel = replace(config.parallel, ep_size=1, replicate=1, exchange=exchange).resized_to(world_size)
    sequences = config.run.sequences_per_rank(before, config.parallel.context)
    grown = replace(
        config,
        run=replace(config.run, global_batch_size=sequences * (world_size // parallel.context)),
        parallel=parallel,
        cluster=replace(config.cluster, num_workers=world_size),
    )
    moved = replace(subject, config=grown, ranks_per_node=node)
    ep_size = max(size for size in ep_sizes(moved) if size <= max_ep_size)
    return replace(moved, config=replace(grown, parallel=replace(grown.parallel, ep_size=ep_size)))
