"""Reads the counts of all routers as one vector and writes one bias vector back; `LossFreeBalancer` does both.

A law (`dispatch.laws.rules`) turns counts into the next bias. `trimtab train` applies it in `workers.control`.

All MoE layers of a model travel as one flat vector, so that a step costs one small reduction whatever the number of
layers, and layers may have different numbers of experts or balancing off.

Shapes: N = sum of num_experts over the MoE layers of the model, in module order; 0 without MoE layers. E experts of one
layer, W integers per expert of the law's statistic (0 without one), M = N (1 + W) counts.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispatch.errors import InvalidValue
from dispatch.laws import STATISTIC_SCALE, BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout
from dispatch.routing.router import Router
from dispatch.values import to_device


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
    """Make the routers count the law's statistic, and add or multiply the bias as the law wants it.

    Call it before the first forward.

    Raises:
        InvalidValue: the routing is limited to groups of experts, which the law cannot balance.
    """
    for name, router in routers.items():
        check_groups(law.config, router.config.num_groups, name)
        router.attach(law.statistic, multiplies_bias=law.entry.multiplies)


def check_groups(config: BalanceConfig, num_groups: int, place: str) -> None:
    """Raise InvalidValue if the law cannot balance group-limited routing. place: the layer or setting to name in it."""
    if num_groups > 1 and not config.entry.group_limited:
        raise InvalidValue(
            f"balance.law {config.law!r} cannot balance {place}, whose choice is limited to groups (num_groups "
            f"{num_groups}): it does not see that a bias also moves tokens between groups; use balance.law adaptive, "
            "or num_groups 1"
        )


def read_counts(routers: Mapping[str, Router]) -> Tensor:
    """Copy what this rank has counted since the last reset: int64 (M,) on the CPU. Waits for the device once.

    The vector has the load of all layers, N integers, then the (E, W) statistic of each layer, if the law has one.
    """
    return _counts(routers).cpu() if routers else torch.zeros(0, dtype=torch.int64)


def _counts(routers: Mapping[str, Router]) -> Tensor:
    """As `read_counts`, but on the device of the routers, without waiting for it; needs at least one router."""
    loads = [router.tokens_per_expert_E for router in routers.values()]
    statistics = [router.statistic_EW.flatten() for router in routers.values()]
    return torch.cat([*loads, *statistics])


def reset_counts(routers: Mapping[str, Router]) -> None:
    """Start a new step: zero every counter in place, also where balancing is off."""
    for router in routers.values():
        router.tokens_per_expert_E.zero_()
        router.statistic_EW.zero_()


def read_bias(routers: Mapping[str, Router]) -> Tensor:
    """Copy the biases that the routers use now: fp32 (N,) on the CPU. Waits for the device once."""
    biases = [router.expert_bias_E for router in routers.values()]
    return torch.cat(biases).cpu() if biases else torch.zeros(0, dtype=torch.float32)


def write_state(routers: Mapping[str, Router], state: LawState) -> None:
    """Set the routers' part of a law state, in place: every bias, and the scale of the law's statistic.

    Raises:
        ValueError: the bias is not fp32 of length N.
    """
    write_bias(routers, state.bias_N)
    scales = state.extras.get(STATISTIC_SCALE)
    if scales is not None:
        _set([router.statistic_scale for router in routers.values()], scales)


def write_bias(routers: Mapping[str, Router], bias_N: Tensor) -> None:
    """Set every bias in place, so that checkpoints and captured graphs keep seeing the same storage.

    Raises:
        ValueError: `bias_N` is not fp32 of length N.
    """
    sizes = [router.num_experts for router in routers.values()]
    if bias_N.dtype != torch.float32 or bias_N.shape != (sum(sizes),):
        raise ValueError(f"bias must be float32 of shape ({sum(sizes)},), got {bias_N.dtype} {tuple(bias_N.shape)}")
    with torch.no_grad():
        _set([router.expert_bias_E for router in routers.values()], bias_N)


def _set(buffers: Sequence[Tensor], values: Tensor) -> None:
    """Set the buffers, in place, to consecutive parts of `values`: one copy to the device, which is not waited for."""
    if buffers:
        on_device = to_device(values, buffers[0].device).split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, on_device, strict=True):
            buffer.copy_(part.view(buffer.shape))


def bias_checksum(bias_N: Tensor) -> int:
    """crc32 of the little-endian fp32 bytes, by which ranks compare their biases bit for bit."""
    return zlib.crc32(bias_N.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())


@dataclass
class LossFreeBalancer:
    """Moves the selection biases of a model's MoE layers in your own training loop (arXiv 2408.15664, algorithm 1).

    Make it after the model and before the first forward, and call `step()` once after every optimizer step.

    Args:
        model: a module with one or more `MoELayer` in it.
        config: the law and its rate.
        group: the ranks whose counts are summed, usually `torch.distributed.group.WORLD`; None for this process alone.
    Raises:
        InvalidValue: the model has no MoE layer; the law does not fit the layers' routing, or needs a horizon that
            `config` does not give.

    Examples:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from dispatch import BalanceConfig, LossFreeBalancer, MoEConfig, MoELayer, make_dispatcher
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dispatcher = make_dispatcher(num_experts=4, ep_group=dist.group.WORLD, hidden=8, top_k=1)
        >>> layer = MoELayer(8, MoEConfig(num_experts=4, top_k=1, ffn_hidden=8), dispatcher)
        >>> balancer = LossFreeBalancer(layer, BalanceConfig(law="sign", rate=1e-3), dist.group.WORLD)
        >>> layer(torch.ones(100, 8)).sum().backward()  # equal tokens all choose the same expert
        >>> load = balancer.step()
        >>> load.sort().values
        tensor([  0,   0,   0, 100])
        >>> layer.router.expert_bias_E[load.argmax()]  # the busiest expert's bias falls
        tensor(-0.0015)
        >>> dist.destroy_process_group()
    """

    model: nn.Module
    config: BalanceConfig
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        self.routers = routers_of(self.model)
        if not self.routers:
            raise InvalidValue("the model has no Router: build it with dispatch.layer.MoELayer before the balancer")
        self.law = Law(self.config, layout_of(self.routers))
        attach_law(self.routers, self.law)
        self.state: LawState = self.law.initial_state()
        write_state(self.routers, self.state)
        self.num_steps = 0

    def step(self) -> Tensor:
        """Sum the counts since the last call over the group, move every bias by the law, and reset the counts.

        Collective over the group: one all-reduce of integers. All ranks get the same biases, bit for bit.

        Returns:
            The global load: int64 (N,) on the CPU, N the number of experts of all MoE layers, in module order.
        """
        counts_M = _counts(self.routers)  # still on their device: NCCL takes no tensors of the CPU
        if self.group is not None:
            dist.all_reduce(counts_M, group=self.group)
        counts_M = counts_M.cpu()
        self.num_steps += 1
        self.state = self.law.update(counts_M, self.state, self.num_steps)
        write_state(self.routers, self.state)
        reset_counts(self.routers)
        return counts_M[: self.law.layout.total]
