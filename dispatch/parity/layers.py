"""The layers that are compared: ours with every dispatcher, others through an adapter, and the slow reference.

Shapes: T tokens of this rank (may be 0), H hidden, E experts.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.config import ScheduleConfig
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.exchange.factory import make_dispatcher
from dispatch.exchange.node_groups import NodeGroups, make_node_groups
from dispatch.exchange.registry import BACKENDS
from dispatch.experts.stacked import Experts, expert_parameters
from dispatch.layer import MoELayer
from dispatch.parity.cases import Case, is_expert_weight
from dispatch.parity.reference import reference_moe
from dispatch.routing.selection import count_by_expert

Pick: TypeAlias = Callable[[nn.Parameter], Tensor]


@dataclass(frozen=True)
class LayerUnderTest:
    """A layer on one rank, and how the check reads and controls it.

    module: y_TH = module(x_TH), collective over the EP group in forward and backward; T may differ by rank and be 0.
    After backward the gradient of an expert must be complete on its rank. All other gradients are this rank's part,
    and the check sums them over the ranks.
    read: read(pick) returns tensors by the names of `cases.shapes`, made of pick(parameter), which is the parameter's
    value or its gradient; of the experts those of this rank, in the order of `ExpertPlacement`.
    expert_parameters: the parameters that only this rank holds.
    expert_bias_E: the selection bias that the layer uses; the check writes it in place.
    tokens_per_expert_E: the choices of this rank's tokens since the check last zeroed it in place; any numeric dtype.
    """

    module: nn.Module
    read: Callable[[Pick], dict[str, Tensor]]
    expert_parameters: Sequence[nn.Parameter]
    expert_bias_E: Tensor
    tokens_per_expert_E: Tensor


# Builds a layer from the case, the initial weights of all experts (on the device and in the dtype to compute in), and
# the EP group.
Adapter: TypeAlias = Callable[[Case, Mapping[str, Tensor], dist.ProcessGroup], LayerUnderTest]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An exchange and a schedule for our layer.

    ranks_per_node: 0 for an exchange that needs no node groups; else lowered to a divisor of the number of ranks.
    """

    exchange: str
    ranks_per_node: int = 0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


_WITHOUT_NODES = {
    name: Variant(exchange=name) for name, backend in BACKENDS.items() if backend.automatic and not backend.needs_nodes
}
_OVER_NODES = {
    f"{name}s-of-{size}": Variant(exchange=name, ranks_per_node=size)
    for name, backend in BACKENDS.items()
    if backend.automatic and backend.needs_nodes
    for size in (1, 2)
}
VARIANTS: Mapping[str, Variant] = {
    **_WITHOUT_NODES,
    **_OVER_NODES,
    "assignment-waiting": Variant(exchange="assignment", schedule=ScheduleConfig(overlap=False)),
    "rank-in-chunks": Variant(exchange="rank", schedule=ScheduleConfig(num_chunks=3)),
    "nodes-in-chunks": Variant(exchange="node", ranks_per_node=2, schedule=ScheduleConfig(num_chunks=2)),
    "rank-in-rounds": Variant(exchange="rank", schedule=ScheduleConfig(max_rows=12)),
}


def adapter_of(name: str) -> Adapter:
    """The adapter of one of our own layers, by its name in VARIANTS."""
    variant = VARIANTS[name]

    @functools.cache  # a layer is built several times for each case, but its process groups need to be formed only once
    def nodes_of(group: dist.ProcessGroup) -> NodeGroups:
        return make_node_groups(group, math.gcd(variant.ranks_per_node, dist.get_world_size(group)))

    def build(case: Case, weights: Mapping[str, Tensor], group: dist.ProcessGroup) -> LayerUnderTest:
        config, nodes = case.config, nodes_of(group) if variant.ranks_per_node else None
        dispatcher = make_dispatcher(
            config.num_experts, group, hidden=case.hidden, top_k=config.top_k, exchange=variant.exchange, nodes=nodes
        )
        return layer_under_test(case, weights, dispatcher, variant.schedule)

    return build


def layer_under_test(
    case: Case, weights: Mapping[str, Tensor], dispatcher: Dispatcher, schedule: ScheduleConfig | None = None
) -> LayerUnderTest:
    """Our layer with any dispatcher, ready to be compared."""
    layer = MoELayer(case.hidden, case.config, dispatcher, schedule)
    layer.to(weights["expert_gate"].device, weights["expert_gate"].dtype)
    ids = layer.experts.expert_ids
    for name, tensor in _read(layer, lambda parameter: parameter.data).items():
        tensor.copy_(weights[name][ids.start : ids.stop] if is_expert_weight(name) else weights[name])
    return LayerUnderTest(
        module=layer,
        read=lambda pick: _read(layer, pick),
        expert_parameters=list(expert_parameters(layer).values()),
        expert_bias_E=layer.router.expert_bias_E,
        tokens_per_expert_E=layer.router.tokens_per_expert_E,
    )


def _read(layer: MoELayer, pick: Pick) -> dict[str, Tensor]:
    tensors = {"router": pick(layer.router.weight), **_read_experts(layer.experts, pick)}
    if layer.shared_experts is not None:
        for part in ("gate", "up", "down"):
            tensors[f"shared_{part}"] = pick(getattr(layer.shared_experts, f"{part}_proj").weight)
    return tensors


def _read_experts(experts: Experts, pick: Pick) -> dict[str, Tensor]:
    """The weights of the experts, or their gradients, as views: initial weights are written through them."""
    gate, up = pick(experts.gate_up_proj).chunk(2, dim=1)
    return {"expert_gate": gate, "expert_up": up, "expert_down": pick(experts.down_proj)}


class SlowLayer(nn.Module):
    """`dispatch.parity.reference` with shared experts, weights and counts as a module: all experts in one process."""

    def __init__(self, case: Case, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = case.config
        self.weights = nn.ParameterDict({name: weight.clone() for name, weight in weights.items()})
        self.expert_bias_E = torch.zeros(self.config.num_experts)
        self.tokens_per_expert_E = torch.zeros(self.config.num_experts, dtype=torch.int64)

    def forward(self, x_TH: Tensor) -> Tensor:
        """The outputs of the routed and the shared experts, token by token; T at least 1."""
        gate, up, down = (self.weights[name] for name in ("expert_gate", "expert_up", "expert_down"))
        y_TH, chosen = reference_moe(
            x_TH, self.weights["router"], self.expert_bias_E, gate, up, down, config=self.config
        )
        self.tokens_per_expert_E += count_by_expert(torch.tensor(chosen), self.config.num_experts)
        if self.config.num_shared_experts:
            gate, up, down = (self.weights[name] for name in ("shared_gate", "shared_up", "shared_down"))
            y_TH = y_TH + (F.silu(x_TH @ gate.t()) * (x_TH @ up.t())) @ down.t()
        return y_TH


def slow_layer(case: Case, weights: Mapping[str, Tensor]) -> LayerUnderTest:
    """The reference as a layer under test. weights: those of all experts, in float64."""
    layer = SlowLayer(case, weights)
    return LayerUnderTest(
        module=layer,
        read=lambda pick: {name: pick(parameter) for name, parameter in layer.weights.items()},
        expert_parameters=[parameter for name, parameter in layer.weights.items() if is_expert_weight(name)],
        expert_bias_E=layer.expert_bias_E,
        tokens_per_expert_E=layer.tokens_per_expert_E,
    )
