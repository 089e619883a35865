"""A law at work on all MoE layers of a model, and its serialisable state.

Shapes: N experts of all MoE layers, E of one, W integers an expert of the law's statistic, M = N (1 + W) counts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dispatch.laws.config import BalanceConfig
from dispatch.laws.registry import LayerLoad, LayerState
from dispatch.layout import LoadLayout
from dispatch.statistics import make_statistic

_WIRE_DTYPES = {"<f4": torch.float32, "<i8": torch.int64}


@dataclass(frozen=True)
class LawState:
    """All that a law carries from step to step.

    bias_N: fp32 (N,), the bias in force. extras: further state by name (momentum, averages), fp32 or int64: (N,) where
    it is kept for each expert, one value a layer otherwise.
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


class Law:
    """A balancing rule for one layout; see `dispatch.laws.register_law` for rules of your own.

    Raises:
        ValueError: the config's rate depends on the length of the run, and its horizon is 0.
    """

    def __init__(self, config: BalanceConfig, layout: LoadLayout) -> None:
        if config.needs_horizon and not config.horizon:
            raise ValueError(
                f"balance.schedule {config.schedule} with balance.zero_last {config.zero_last} needs the length of the "
                "run: set balance.horizon to its number of steps"
            )
        self.config, self.layout, self.entry = config, layout, config.entry
        self.statistic = make_statistic(self.entry.statistic) if self.entry.statistic else None
        self._width = self.statistic.width if self.statistic else 0
        self._options = {**self.entry.options, **config.options}

    @property
    def num_counts(self) -> int:
        """M: the load of all layers, then their statistic, layer by layer as (E, W)."""
        return self.layout.total * (1 + self._width)

    def initial_state(self) -> LawState:
        """Bias zero everywhere."""
        total, num_layers = self.layout.total, len(self.layout.names)
        sizes = [(total, self.entry.per_expert), (num_layers, self.entry.per_layer)]
        extras = {
            name: torch.full((size,), value, dtype=torch.float32)
            for size, initial in sizes
            for name, value in initial.items()
        }
        return LawState(torch.zeros(total, dtype=torch.float32), extras)

    def update(self, counts_M: Tensor, state: LawState, step: int) -> LawState:
        """The state after a step, counted from 1. Does not modify its arguments.

        Args:
            counts_M: int64 (M,), what `dispatch.balance.read_counts` gave, over all ranks. The first N are the load.
            state: what routed the step.

        A layer that is not balanced or saw no token keeps its state.
        """
        self._check(counts_M, state)
        rate = self.config.rate_at(step)
        if rate == 0:
            return state
        load_N, statistic_NW = counts_M[: self.layout.total], counts_M[self.layout.total :].view(-1, self._width or 1)
        bias_N, extras = state.bias_N.clone(), {name: value.clone() for name, value in state.extras.items()}
        for layer, where in self._active(load_N):
            load = LayerLoad(load_N[where], statistic_NW[where] if self._width else statistic_NW[:0])
            now = LayerState(
                bias_N[where].double(), {name: extras[name][self._part(name, layer, where)].double() for name in extras}
            )
            after = self.entry.rule(load, now, rate, **self._options)
            bias_N[where] = (_rescaled if self.entry.multiplies else _centred)(after.bias_E)
            for name, value in extras.items():
                value[self._part(name, layer, where)] = after.extras[name].float()
        return LawState(bias_N, extras)

    def _active(self, load_N: Tensor) -> Iterator[tuple[int, slice]]:
        for layer, (where, balanced) in enumerate(zip(self.layout.slices, self.layout.balanced, strict=True)):
            if balanced and bool(load_N[where].any()):
                yield layer, where

    def _part(self, name: str, layer: int, where: slice) -> slice:
        return where if name in self.entry.per_expert else slice(layer, layer + 1)

    def _check(self, counts_M: Tensor, state: LawState) -> None:
        if counts_M.dtype != torch.int64 or counts_M.shape != (self.num_counts,):
            got = f"{counts_M.dtype} {tuple(counts_M.shape)}"
            raise ValueError(f"counts must be int64 of shape ({self.num_counts},), got {got}")
        if state.bias_N.dtype != torch.float32 or state.bias_N.shape != (self.layout.total,):
            got = f"{state.bias_N.dtype} {tuple(state.bias_N.shape)}"
            raise ValueError(f"bias must be float32 of shape ({self.layout.total},), got {got}")


def make_law(config: BalanceConfig, layout: LoadLayout) -> Law:
    """The law that `config` names, for the layers of `layout`."""
    return Law(config, layout)


def _centred(bias_E: Tensor) -> Tensor:
    # Centring changes no choice, since top-k ignores a constant, and keeps the bias from drifting by
    # rate * (#under - #over) / E a step. fsum is exact, so the mean does not depend on the vector width of the machine.
    return (bias_E - math.fsum(bias_E.tolist()) / bias_E.numel()).float()


def _rescaled(bias_E: Tensor) -> Tensor:
    # What centring is for a sum, a common factor is for a product. Factors stay positive, or the order would turn.
    factor_E = (1 + bias_E).clamp_min(1e-3)
    return (factor_E / (math.fsum(factor_E.tolist()) / factor_E.numel()) - 1).float()


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
