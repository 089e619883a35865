"""Balancing laws: pure functions from the load of one step and a small state to the next bias.

A law never sees tokens, ranks or gradients. The same load and state give the same bits on any machine, world size and
reduction order: counts are int64, means are exact (`math.fsum`), and every result is rounded to fp32 once.

Shapes: N = experts of all MoE layers, E = experts of one layer (see dispatch.layout).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dispatch.layout import LoadLayout

_WIRE_DTYPES = {"<f4": torch.float32, "<i8": torch.int64}


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How the selection bias follows the load."""

    law: str = "sign"
    """Rule that turns the load of a step into the next bias: 'sign' (arXiv 2408.15664) or 'none'."""
    rate: float = 1e-3
    """Step of the bias, in units of the router's score. 1e-3 is the published value for tens of thousands of steps."""

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"balance.law is {self.law!r}; it must be one of {', '.join(sorted(LAWS))}")
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise ValueError(f"balance.rate ({self.rate}) must be finite and at least 0; 0.001 is the published value")


@dataclass(frozen=True)
class LawState:
    """All that a law carries from step to step.

    bias_N: fp32 (N,), the bias in force. extras: further state by name (momentum, averages), fp32 or int64.
    """

    bias_N: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """Plain str, bytes and lists, fit for msgpack or JSON-with-bytes; no pickle."""
        return {"bias": _pack(self.bias_N), "extras": {name: _pack(value) for name, value in self.extras.items()}}

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> "LawState":
        """Read what `to_wire` wrote. Raises ValueError on an unknown dtype or a length that does not fit it."""
        return LawState(_unpack(wire["bias"]), {name: _unpack(value) for name, value in wire["extras"].items()})


class Law(Protocol):
    """A balancing rule for one layout."""

    @property
    def layout(self) -> LoadLayout:
        """The layers that it steers."""
        ...

    def initial_state(self) -> LawState:
        """Bias zero everywhere."""
        ...

    def update(self, load_N: Tensor, state: LawState, step: int) -> LawState:
        """The state after a step whose global batch had this load: int64 (N,). Does not modify its arguments."""
        ...


@dataclass(frozen=True)
class NoLaw:
    """`none`: the bias stays what it is, for comparison and for frozen models."""

    layout: LoadLayout
    config: BalanceConfig

    def initial_state(self) -> LawState:
        """Bias zero everywhere."""
        return LawState(torch.zeros(self.layout.total, dtype=torch.float32))

    def update(self, load_N: Tensor, state: LawState, step: int) -> LawState:
        """The same state."""
        _check(load_N, state, self.layout)
        return state


@dataclass(frozen=True)
class SignLaw(NoLaw):
    """`sign`: b_i += rate * sign(mean(load) - load_i), then centred to mean zero (arXiv 2408.15664, algorithm 1).

    The comparison is made in integers as sign(total - E * load_i): a mean in floating point has flipped it (Megatron-LM
    #7081). Centring changes no choice, since top-k ignores a constant, and keeps the bias from drifting by
    rate * (#under - #over) / E a step; torchtitan #1506 centres too.
    """

    def update(self, load_N: Tensor, state: LawState, step: int) -> LawState:
        """One step of the rule on every balanced layer; a layer that saw no token keeps its bias."""
        _check(load_N, state, self.layout)
        bias_N = state.bias_N.clone()
        for where, num_experts, balanced in zip(
            self.layout.slices, self.layout.num_experts, self.layout.balanced, strict=True
        ):
            if balanced:
                load_E = load_N[where]
                direction_E = torch.sign(load_E.sum() - num_experts * load_E)
                bias_N[where] = _centred(bias_N[where].double() + self.config.rate * direction_E.double())
        return LawState(bias_N, state.extras)


LAWS: Mapping[str, Callable[[LoadLayout, BalanceConfig], Law]] = {"none": NoLaw, "sign": SignLaw}


def make_law(config: BalanceConfig, layout: LoadLayout) -> Law:
    """The law that `config` names, for the layers of `layout`."""
    return LAWS[config.law](layout, config)


def _centred(bias_E: Tensor) -> Tensor:
    # fsum is exact, so the mean does not depend on the vector width of the machine that computes it.
    return (bias_E - math.fsum(bias_E.tolist()) / bias_E.numel()).float()


def _check(load_N: Tensor, state: LawState, layout: LoadLayout) -> None:
    if load_N.dtype != torch.int64 or load_N.shape != (layout.total,):
        raise ValueError(f"load must be int64 of shape ({layout.total},), got {load_N.dtype} {tuple(load_N.shape)}")
    if state.bias_N.dtype != torch.float32 or state.bias_N.shape != (layout.total,):
        raise ValueError(
            f"bias must be float32 of shape ({layout.total},), got {state.bias_N.dtype} {tuple(state.bias_N.shape)}"
        )


def _pack(value: Tensor) -> list[Any]:
    dtype = next((name for name, known in _WIRE_DTYPES.items() if known == value.dtype), None)
    if dtype is None or value.dim() != 1:
        raise ValueError(f"law state must be 1-D float32 or int64, got {value.dtype} of shape {tuple(value.shape)}")
    return [dtype, value.contiguous().numpy().astype(dtype).tobytes()]


def _unpack(packed: Any) -> Tensor:
    dtype, raw = packed
    if dtype not in _WIRE_DTYPES or not isinstance(raw, bytes) or len(raw) % int(dtype[2]):
        raise ValueError(f"law state has dtype {dtype!r}; it must be one of {', '.join(_WIRE_DTYPES)} with whole items")
    return (
        torch.frombuffer(bytearray(raw), dtype=_WIRE_DTYPES[dtype])
        if raw
        else torch.zeros(0, dtype=_WIRE_DTYPES[dtype])
    )
