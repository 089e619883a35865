"""The measured layer: builds it from a case, runs steps on fresh tokens, and reads phases and bytes of a step.

Shapes: T tokens of this rank (may be 0, may differ by rank and step), H hidden, K top-k.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.config import ScheduleConfig
from dispatch.diagnosis.activity import MOE_PHASES
from dispatch.diagnosis.meter import Message
from dispatch.exchange.factory import make_dispatcher
from dispatch.exchange.node_groups import NodeGroups, make_node_groups
from dispatch.exchange.registry import BACKENDS
from dispatch.layer import MoELayer
from dispatch.parity.workloads import tokens_that_choose
from runtime.commands.bench.dispatch.case import LayerCase
from runtime.commands.bench.dispatch.limits import matmul_flops
from runtime.commands.bench.dispatch.routes import Nodes, bytes_of_four_passes

Sample = dict[str, float]


@dataclass(frozen=True)
class RankContext:
    """This rank among those of the benchmark. node_groups: None if no exchange of the case can use them."""

    group: dist.ProcessGroup
    device: torch.device
    node_groups: NodeGroups | None

    @classmethod
    def of(cls, case: LayerCase, group: dist.ProcessGroup, device: torch.device) -> "RankContext":
        """Describe this rank, with groups of nodes where the exchange or the count of bytes needs them. Collective."""
        several = 1 < case.ranks_per_node < case.workers
        wanted = case.workers > 1 and (several or (case.exchange != "auto" and BACKENDS[case.exchange].needs_nodes))
        return cls(group, device, make_node_groups(group, case.ranks_per_node) if wanted else None)

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return dist.get_rank(self.group)


@dataclass
class LayerRun:
    """A layer, with methods to run a step of it and to measure what the step did."""

    layer: MoELayer
    case: LayerCase
    context: RankContext
    dtype: torch.dtype
    messages: list[Message] = field(default_factory=list)
    _topk_ids_TK: Tensor | None = None

    @classmethod
    def build(cls, case: LayerCase, dtype: torch.dtype, schedule: ScheduleConfig, context: RankContext) -> "LayerRun":
        """A new layer, with memory of its own; its router has the same weights on all ranks and every time."""
        torch.manual_seed(0)
        dispatcher = make_dispatcher(
            case.moe.num_experts,
            context.group,
            hidden=case.hidden,
            top_k=case.moe.top_k,
            exchange=case.exchange,
            payload=case.payload,
            nodes=context.node_groups,
        )
        layer = MoELayer(case.hidden, case.moe, dispatcher, schedule).to(context.device, dtype)
        run = cls(layer, case, context, dtype)
        layer.router.register_forward_hook(run._note_choice)
        dispatcher.meter.messages = []
        return run

    def _note_choice(self, _module: object, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
        self._topk_ids_TK = output[0]

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens of this rank in a step and a gradient of the output, both (T, H)."""
        case, rank = self.case, self.context.rank
        seed = step * case.workers + rank
        generator = torch.Generator().manual_seed(seed)
        if workload := case.make_workload():
            ids_TK = workload.route(rank, step)
            x_TH = tokens_that_choose(ids_TK, self.layer.router.weight, seed)
        else:
            x_TH = torch.randn(case.tokens, case.hidden, generator=generator)
        grad_TH = torch.randn(x_TH.shape, generator=generator)
        x_TH, grad_TH = (tensor.to(self.context.device, self.dtype) for tensor in (x_TH, grad_TH))
        return x_TH.requires_grad_(), grad_TH

    def step(self, x_TH: Tensor, grad_TH: Tensor) -> None:
        """Run forward and backward. Collective."""
        self.layer(x_TH).backward(grad_TH)

    def clear(self, x_TH: Tensor) -> None:
        """Free all gradients."""
        self.layer.zero_grad(set_to_none=True)
        x_TH.grad = None

    def account(self) -> Sample:
        """Return phases, rows and bytes of the steps since the last call, and reset the counts. Collective."""
        meter, router, moe = self.layer.dispatcher.meter, self.layer.router, self.case.moe
        reading, self.messages = meter.take(), meter.messages or []
        meter.messages = []
        load_E = router.tokens_per_expert_E.clone()
        router.tokens_per_expert_E.zero_()
        dist.all_reduce(load_E, group=self.context.group)
        sent, floor = self._sent_and_floor()
        return {
            **{f"{phase}_s": reading.seconds[phase] for phase in MOE_PHASES},
            **{f"{link}_bytes": float(num_bytes) for link, num_bytes in sent.items()},
            **{f"floor_{link}_bytes": float(num_bytes) for link, num_bytes in floor.items()},
            "flops": float(matmul_flops(reading.received, self.case.hidden, moe.ffn_hidden)),
            "busiest_over_mean": float(load_E.max() / load_E.double().mean()),
        }

    def _sent_and_floor(self) -> tuple[dict[str, int], dict[str, int]]:
        nodes = Nodes(self.context.rank, self.case.ranks_per_node)
        row_bytes = bytes_of_four_passes(self.case.hidden, self.dtype.itemsize, self.case.payload)
        assert self._topk_ids_TK is not None  # noqa: S101 - a step was made
        floor = nodes.floor_bytes(self._topk_ids_TK, self.layer.dispatcher.placement, row_bytes)
        return nodes.sent_bytes(self.messages), floor


def schedules(case: LayerCase) -> dict[str, ScheduleConfig]:
    """The schedules to measure by name: first that of the case, then those it is compared with."""
    if case.num_chunks == 1:  # nothing can overlap: the case has no shared experts
        return {"layer": ScheduleConfig()}
    return {
        "layer": ScheduleConfig(num_chunks=case.num_chunks),
        "no overlap": ScheduleConfig(num_chunks=case.num_chunks, overlap=False),
        "uncut": ScheduleConfig(),
    }
