"""Low-rank adapters (LoRA, arXiv 2106.09685): narrow matrices are trained, whose products are added to frozen weights.

A matrix W becomes W + scale * B A, with A (rank, in), B (out, rank) and scale = alpha / rank. A parameter that packs
several matrices, such as queries, keys and values, or gate and up, has one A for all of them.

Shapes: L local experts, R rank, H hidden, F ffn_hidden, G = 2F.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.errors import InvalidValue
from dispatch.experts.stacked import Experts
from workers.model.freezing import part_of

TARGETS = ("attention", "experts", "dense_ffn", "shared_experts")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters on the matrices of some parts; everything else is then frozen."""

    rank: int = 0
    """Inner width of an adapter; 0 for no adapters: the model itself is trained."""
    alpha: float = 16.0
    """An adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("attention",)
    """Parts that get adapters: attention, experts, dense_ffn, shared_experts."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise InvalidValue(f"lora.rank ({self.rank}) must be a whole number, at least 1, or 0 for no adapters")
        if not 0 < self.alpha < float("inf"):
            raise InvalidValue(f"lora.alpha ({self.alpha}) must be above 0 and finite; twice the rank is usual")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise InvalidValue(
                f"lora.targets names {', '.join(unknown) or 'nothing'}; parts that can have adapters are "
                f"{', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0

    @property
    def adapts_experts(self) -> bool:
        """Whether routed experts have adapters."""
        return self.rank > 0 and "experts" in self.targets


def gathers_experts_narrow(dtype: str, lora: LoraConfig) -> bool:
    """Whether sharded experts are gathered in bfloat16: half the bytes, and the same values as a cast after the gather.

    Not where experts have adapters, which are added to fp32 weights. dtype: `run.dtype`. For dense weights see
    workers.training.narrow_gather.
    """
    return dtype == "bfloat16" and not lora.adapts_experts


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: lora_A (R, in), lora_B (out, R)."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """As of nn.Linear."""
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class LoraExperts(Experts):
    """The experts of a rank, each with adapters of its own. An adapter is on the rank of its expert: none is exchanged.

    gate_up_proj_lora_A is (L, R, H) and gate_up_proj_lora_B (L, G, R); those of down_proj are (L, R, F) and (L, H, R).
    """

    gate_up_proj_lora_A: nn.Parameter
    gate_up_proj_lora_B: nn.Parameter
    down_proj_lora_A: nn.Parameter
    down_proj_lora_B: nn.Parameter
    lora_scale: float

    def stacks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weights with the adapters added, so that every kernel for plain experts can be used.

        This adds a share of R / (rows of an expert) to the operations of the experts. Each layer keeps the sums for
        backward, 3 L H F elements in the compute dtype, unless model.recompute is on, and its backward holds their
        gradient for a moment. The frozen base weights never have gradients or optimizer state.
        """
        # In fp32: in bf16 the small product of the adapters would be rounded away beside the weight.
        with torch.autocast(self.gate_up_proj.device.type, enabled=False):
            gate_up, down = map(self._merged, ("gate_up_proj", "down_proj"))
            return gate_up.to(dtype), down.to(dtype)

    def _merged(self, name: str) -> Tensor:
        weight_LOI, lora_a_LRI, lora_b_LOR = (self.rows(name + part) for part in ("", "_lora_A", "_lora_B"))
        return torch.baddbmm(weight_LOI, lora_b_LOR, lora_a_LRI, alpha=self.lora_scale)


def effective_weight(linear: nn.Linear) -> Tensor:
    """The weight (out, in) that a linear layer multiplies by, adapter included, for code that does not call it."""
    if isinstance(linear, LoraLinear):
        return torch.addmm(linear.weight, linear.lora_B, linear.lora_A, alpha=linear.lora_scale)
    return linear.weight


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a model and give adapters to the matrices of its blocks. B is zero, so that they add nothing at first."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in model.named_modules():
        # Not the gate of shared experts, which is a vector, nor the layer for multi-token prediction.
        if (
            part_of(f"{name}.weight") in config.targets
            and name.startswith("layers.")
            and name.endswith(("_proj", ".experts"))
        ):
            _adapt(module, config)


def _adapt(module: nn.Module, config: LoraConfig) -> None:
    """Add an adapter to a module by changing its class, as FSDP does.

    Names of parameters and references to the module then stay as they are.
    """
    if isinstance(module, Experts):
        for name in ("gate_up_proj", "down_proj"):
            _register(module, f"{name}_", getattr(module, name), config.rank)
        module.__class__ = LoraExperts
    elif isinstance(module, nn.Linear):
        _register(module, "", module.weight, config.rank)
        module.__class__ = LoraLinear
    cast(LoraExperts | LoraLinear, module).lora_scale = config.scale


def _register(module: nn.Module, prefix: str, weight: Tensor, rank: int) -> None:
    *stack, num_out, num_in = weight.shape
    lora_a, lora_b = weight.new_empty(*stack, rank, num_in), weight.new_zeros(*stack, num_out, rank)
    nn.init.normal_(lora_a, std=num_in**-0.5)
    module.register_parameter(f"{prefix}lora_A", nn.Parameter(lora_a))
    module.register_parameter(f"{prefix}lora_B", nn.Parameter(lora_b))


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name, canonical or of a parameter, is a part of an adapter."""
    return name.endswith(("lora_A", "lora_B"))


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state by canonical name without its adapters, which an imported checkpoint does not have."""
    return {name: tensor for name, tensor in state.items() if not is_adapter(name)}


def adapter_names(name: str) -> tuple[str, str]:
    """The names that A and B of this matrix have, or would have if it had an adapter."""
    base = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    return f"{base}lora_A", f"{base}lora_B"
