"""From router counts to one load vector and from one bias vector back to the routers.

All MoE layers of a model travel as one flat vector, so that a step costs one small reduction whatever the number of
layers, and layers may have different numbers of experts or balancing off.

Shapes: N = sum of num_experts over the MoE layers of the model, in module order. N is 0 in a model without MoE layers.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispatch.errors import InvalidValue
from dispatch.laws import BalanceConfig, Law, LawState, make_law
from dispatch.laws.registry import STATISTIC_SCALE
from dispatch.layout import LoadLayout
from dispatch.router import Router


def routers_of(model: nn.Module) -> dict[str, Router]:
    """All routers of `model` by module name, in module order: the order of every load and bias vector."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def layout_of(routers: Mapping[str, Router]) -> LoadLayout:
    """Describe the load vector of these routers. A frozen router is not balanced: its bias must not drift."""
    return LoadLayout(
        names=tuple(routers),
        num_experts=tuple(router.num_experts for router in routers.values()),
        balanced=tuple(router.steers_bias for router in routers.values()),
    )


def attach_law(routers: Mapping[str, Router], law: Law) -> None:
    """Let the routers count what the law asks for and use its bias as it means it. Before the first forward.

    Raises:
        ValueError: a router is limited to groups, and the law is not fit for that.
    """
    for name, router in routers.items():
        check_groups(law.config, router.config.num_groups, name)
        router.attach(law.statistic, multiplies_bias=law.entry.multiplies)


def check_groups(config: BalanceConfig, num_groups: int, place: str) -> None:
    """Refuse a law that is not fit for routing that is limited to groups. Raises ValueError, which names `place`."""
    if num_groups > 1 and not config.entry.group_limited:
        raise InvalidValue(
            f"balance.law {config.law!r} cannot balance {place}, whose choice is limited to groups (num_groups "
            f"{num_groups}): it does not see that a bias moves tokens between groups too; use balance.law adaptive, or "
            "num_groups 1"
        )


def read_counts(routers: Mapping[str, Router]) -> Tensor:
    """What this rank counted since the last reset: int64 (M,) on the CPU, a copy. Waits for the device once.

    M: the load of all layers, N, then what the law attached, layer by layer as (E, W).
    """
    loads = [router.tokens_per_expert_E for router in routers.values()]
    statistics = [router.statistic_EW.flatten() for router in routers.values()]
    return torch.cat([*loads, *statistics]).cpu() if loads else torch.zeros(0, dtype=torch.int64)


def reset_counts(routers: Mapping[str, Router]) -> None:
    """Start a new step: zero every counter in place, also where balancing is off."""
    for router in routers.values():
        router.tokens_per_expert_E.zero_()
        router.statistic_EW.zero_()


def read_bias(routers: Mapping[str, Router]) -> Tensor:
    """The live biases: fp32 (N,) on the CPU, a copy. Waits for the device once."""
    biases = [router.expert_bias_E for router in routers.values()]
    return torch.cat(biases).cpu() if biases else torch.zeros(0, dtype=torch.float32)


def write_state(routers: Mapping[str, Router], state: LawState) -> None:
    """Set what the routers need of a law state, in place: every bias, and the scale of the law's statistic.

    Raises:
        ValueError: the bias is not fp32 of length N.
    """
    write_bias(routers, state.bias_N)
    scales = state.extras.get(STATISTIC_SCALE)
    if scales is not None:
        for router, scale in zip(routers.values(), scales, strict=True):
            router.statistic_scale.copy_(scale)


def write_bias(routers: Mapping[str, Router], bias_N: Tensor) -> None:
    """Set every bias in place, so that checkpoints and captured graphs keep seeing the same storage.

    Raises:
        ValueError: `bias_N` is not fp32 of length N.
    """
    sizes = [router.num_experts for router in routers.values()]
    if bias_N.dtype != torch.float32 or bias_N.shape != (sum(sizes),):
        raise ValueError(f"bias must be float32 of shape ({sum(sizes)},), got {bias_N.dtype} {tuple(bias_N.shape)}")
    with torch.no_grad():
        for router, bias_E in zip(routers.values(), bias_N.split(sizes), strict=True):
            router.expert_bias_E.copy_(bias_E)


def bias_checksum(bias_N: Tensor) -> int:
    """crc32 of the little-endian fp32 bytes: equal on two ranks exactly when the biases are equal bit for bit."""
    return zlib.crc32(bias_N.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())


@dataclass
class LossFreeBalancer:
    """Bias-based balancing for a training loop of one's own, without a coordinator.

    Call `step()` once after every optimizer step, on every rank of `group` together: it sums the counts of the step
    over the group, applies the law and sets the biases, identically on all ranks. One all-reduce of the law's counts.
    `group=None` means this process alone; pass `torch.distributed.group.WORLD` for all ranks. Source: arXiv 2408.15664,
    algorithm 1.
    """

    model: nn.Module
    config: BalanceConfig
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        self.routers = routers_of(self.model)
        if not self.routers:
            raise ValueError("the model has no Router: build it with dispatch.layer.MoELayer before the balancer")
        self.law = make_law(self.config, layout_of(self.routers))
        attach_law(self.routers, self.law)
        self.state: LawState = self.law.initial_state()
        write_state(self.routers, self.state)
        self.num_steps = 0

    def step(self) -> Tensor:
        """Sum, update, reset. Returns the global load of the step, int64 (N,) on the CPU."""
        device = next(iter(self.routers.values())).tokens_per_expert_E.device
        counts_M = read_counts(self.routers).to(device)
        if self.group is not None:
            dist.all_reduce(counts_M, group=self.group)
        counts_M = counts_M.cpu()
        self.num_steps += 1
        self.state = self.law.update(counts_M, self.state, self.num_steps)
        write_state(self.routers, self.state)
        reset_counts(self.routers)
        return counts_M[: self.law.layout.total]
