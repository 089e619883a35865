"""One MoE layer of one micro-batch, whose ranks wait for each other at every exchange.

A row travels to its expert, is computed and travels back; backward does the same. No rank goes on before it has what
all others send it, so that the rank with most rows sets the time of each stretch between two exchanges. That rank also
receives and sends more than others, as many times more as it has more rows, and at most every token of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.commands.plan.activations import MicroBatch
from runtime.commands.plan.simulate.hardware import Hardware
from runtime.commands.plan.simulate.work import expert_work
from runtime.commands.plan.traffic import Links, Traffic
from workers.model.model_config import ModelConfig

# Messages to each peer: how many rows come, the rows, and their answers; backward knows the numbers already.
FORWARD_ROUNDS, BACKWARD_ROUNDS, AGAIN_ROUNDS = 3, 2, 2


@dataclass(frozen=True)
class Exchange:
    """What a rank sends in one layer of one micro-batch.

    node_peers, network_peers: the ranks of the group on its node and on others, without itself. recomputed: whether
    backward dispatches again.
    """

    traffic: Traffic
    node_peers: int
    network_peers: int
    recomputed: bool


@dataclass(frozen=True)
class LayerTime:
    """Seconds until the slowest rank is through, by direction."""

    forward_experts: float
    backward_experts: float
    forward_exchange: float
    backward_exchange: float


def with_rows(batch: MicroBatch, factor: float, ep_size: int) -> MicroBatch:
    """The micro-batch of a rank that computes `factor` times the rows that are planned."""
    arrived = min(batch.arrived_rows * factor, float(batch.tokens * ep_size)) if batch.exchanges else batch.arrived_rows
    return replace(batch, expert_rows=batch.expert_rows * factor, arrived_rows=arrived)


def layer_time(
    config: ModelConfig,
    batch: MicroBatch,
    hardware: Hardware,
    exchange: Exchange,
    factors_P: NDArray[np.float64],
    num_ranks: int,
) -> LayerTime:
    """Time of the slowest rank of one group. num_ranks: all ranks, which share the cores if `hardware.cores` is set."""
    ep_size = len(factors_P)
    # With a device each, only the rank with most rows counts.
    counted = factors_P if hardware.cores else factors_P.max(keepdims=True)
    experts = [expert_work(config, with_rows(batch, float(factor), ep_size)) for factor in counted]
    forward = [work.forward.seconds(hardware) for work in experts]
    backward = [work.backward.seconds(hardware) for work in experts]
    recomputes = exchange.recomputed
    excess = with_rows(batch, float(factors_P.max()), ep_size).arrived_rows / max(batch.arrived_rows, 1e-9)
    crowding = hardware.crowding(num_ranks)

    def travel(links: Links, rounds: int) -> float:
        node = hardware.node.seconds(links.node * excess, rounds * exchange.node_peers)
        return crowding * (node + hardware.network.seconds(links.network * excess, rounds * exchange.network_peers))

    return LayerTime(
        forward_experts=_side_by_side(forward, hardware, num_ranks),
        backward_experts=_side_by_side(backward, hardware, num_ranks)
        + recomputes * _side_by_side(forward, hardware, num_ranks),
        forward_exchange=travel(exchange.traffic.forward, FORWARD_ROUNDS),
        backward_exchange=travel(exchange.traffic.backward, BACKWARD_ROUNDS + recomputes * AGAIN_ROUNDS),
    )


def _side_by_side(seconds: Sequence[float], hardware: Hardware, num_ranks: int) -> float:
    """Seconds until the last rank has finished: the longest, or all work over all cores where that is longer."""
    if not hardware.cores:
        return max(seconds)
    return max(*seconds, sum(seconds) / len(seconds) * hardware.crowding(num_ranks))
