"""The case of one race, and the weights and tokens that all of its layers get.

Shapes: T tokens of this rank, E experts, H hidden, F ffn_hidden, K top-k.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from dispatch.exchange.placement import ExpertPlacement
from runtime.commands.bench.dispatch.limits import Shape

HOTTEST_OVER_MEAN = 3.7
"""Load of the busiest expert over the mean load in a skewed race."""
CALIBRATION_TOKENS = 8192  # enough for the load of the busiest expert to be known to a few percent
CHECK_MARGIN = 0.05
"""Least distance of the k-th from the next router logit in the tokens of the check; see `TokenSource.draw_clear`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One race: all settings that change its results."""

    shape_name: str
    shape: Shape
    dtype_name: str
    ep_size: int
    skewed: bool
    threads: int
    allocator: str
    rounds: int

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and expert weights."""
        found: torch.dtype = getattr(torch, self.dtype_name)
        return found

    @property
    def title(self) -> str:
        """In one line, for people."""
        ranks = "1 process" if self.ep_size == 1 else f"EP {self.ep_size}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        load = "skewed" if self.skewed else "balanced"
        return f"{self.shape_name} {self.dtype_name}, {load}, {ranks}, {threads} a rank, {self.allocator} allocator"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `asdict` made of one."""
        return cls(**(values | {"shape": Shape(**values["shape"])}))


@dataclass(frozen=True)
class LayerWeights:
    """The weights of a layer, or their gradients, in one layout, in which all layers are compared."""

    router_EH: Tensor
    gate_EFH: Tensor
    up_EFH: Tensor
    down_EHF: Tensor

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Self:
        """Normal weights of variance 1 / fan-in: fp32 tensors with values that `dtype` can represent exactly."""
        experts, hidden, ffn_hidden = shape.num_experts, shape.hidden, shape.ffn_hidden
        sizes = (
            (experts, hidden),
            (experts, ffn_hidden, hidden),
            (experts, ffn_hidden, hidden),
            (experts, hidden, ffn_hidden),
        )
        return cls(*(torch.randn(size, generator=generator).mul_(size[-1] ** -0.5).to(dtype).float() for size in sizes))

    def of_experts(self, expert_ids: range) -> Self:
        """The whole router, and the share of the experts `expert_ids`."""
        share = slice(expert_ids.start, expert_ids.stop)
        return type(self)(self.router_EH, self.gate_EFH[share], self.up_EFH[share], self.down_EHF[share])

    def gate_up(self) -> Tensor:
        """Gate and up as one (E, 2F, H), gate rows first, as several layers store them."""
        return torch.cat([self.gate_EFH, self.up_EFH], 1)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each weight: router, gate, up, down."""
        for field in fields(self):
            yield field.name.split("_")[0], getattr(self, field.name)


def experts_of_rank(shape: Shape, ep_size: int, ep_rank: int) -> range:
    """The experts that a rank holds, in every layer of the race."""
    return ExpertPlacement(shape.num_experts, ep_size).owned_by(ep_rank)


@dataclass(frozen=True)
class TokenSource:
    """Draws tokens for one rank: noise plus a component that all tokens share, which makes some experts popular."""

    router_EH: Tensor
    top_k: int
    dtype: torch.dtype
    common_H: Tensor
    generator: torch.Generator

    def draw(self, num_tokens: int) -> Tensor:
        """(num_tokens, H), a leaf that requires a gradient."""
        return self._plain(num_tokens).requires_grad_()

    def draw_clear(self, num_tokens: int) -> Tensor:
        """As `draw`, but only tokens whose choice of experts does not depend on rounding.

        Where two experts have nearly equal scores, rounding decides, and a layer that chose the other one is not wrong.
        A gate in bf16 rounds a logit by up to 1/256 of its size. With CHECK_MARGIN it chooses as a gate in fp32 does,
        so that one small limit of error fits every layer.
        """
        kept: list[Tensor] = []
        while sum(map(len, kept)) < num_tokens:
            x_TH = self._plain(num_tokens)
            best = (x_TH.float() @ self.router_EH.t()).topk(self.top_k + 1).values
            kept.append(x_TH[best[:, -2] - best[:, -1] > CHECK_MARGIN])
        return torch.cat(kept)[:num_tokens].requires_grad_()

    def _plain(self, num_tokens: int) -> Tensor:
        noise_TH = torch.randn(num_tokens, len(self.common_H), generator=self.generator)
        return noise_TH.add_(self.common_H).to(self.dtype)


def common_component(weights: LayerWeights, top_k: int, generator: torch.Generator) -> Tensor:
    """A vector (H,) which, added to every token, makes the load of the busiest expert HOTTEST_OVER_MEAN x the mean."""
    direction_H = torch.randn(weights.router_EH.shape[1], generator=generator)
    noise_TH = torch.randn(CALIBRATION_TOKENS, len(direction_H), generator=generator)
    logits_TE, common_E = noise_TH @ weights.router_EH.t(), weights.router_EH @ direction_H
    low, high = 0.0, 16.0  # at 16 nearly all tokens choose alike: the wanted load is in between, found by bisection
    for _ in range(20):
        strength = (low + high) / 2
        too_even = hottest_over_mean(logits_TE + strength * common_E, top_k) < HOTTEST_OVER_MEAN
        low, high = (strength, high) if too_even else (low, strength)
    return direction_H * high


def tokens_per_expert(logits_TE: Tensor, top_k: int) -> Tensor:
    """Assignments of each expert, (E,)."""
    return logits_TE.topk(top_k).indices.flatten().bincount(minlength=logits_TE.shape[1])


def hottest_over_mean(logits_TE: Tensor, top_k: int) -> float:
    """Load of the busiest expert over the mean load."""
    counts_E = tokens_per_expert(logits_TE, top_k).float()
    return float(counts_E.max() / counts_E.mean())
