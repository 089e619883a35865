"""The balancing law of a run: its settings, its state, and its application to all MoE layers of a model.

Shapes: N experts of all MoE layers, E of one, W integers per expert of the law's statistic, M = N (1 + W) counts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dispatch.errors import InvalidValue
from dispatch.laws.rules import LAWS, LawEntry, LayerLoad, LayerState
from dispatch.layout import LoadLayout
from dispatch.registry import checked_options, is_number
from dispatch.routing.statistics import make_statistic

_WIRE_DTYPES = {"<f4": torch.float32, "<i8": torch.int64}


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Which law moves the selection bias, and how fast.

    Raises:
        InvalidValue: the law is not known, `module` cannot be imported, or a value is out of its range. It is also a
            ValueError.

    Examples:
        >>> from dispatch import BalanceConfig
        >>> BalanceConfig(law="sign").rate_at(step=1)
        0.001
        >>> BalanceConfig(law="sign", schedule="linear", horizon=10).rate_at(step=5)
        0.0005
    """

    law: Annotated[str, LAWS] = "adaptive"
    """Rule that turns the load of a step into the next bias; docs/laws.md describes each."""
    rate: float | None = None
    """Step of the bias, in the law's own unit; empty: the law's default."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Further constants of the law, such as {"beta": 0.9}; docs/laws.md lists them."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate changes over the run: constant, or falling to zero linearly or as half a cosine."""
    zero_last: float = 0.0
    """Last part of the run in which the bias does not move, in 0 to 1 (0.034 in DeepSeek-V3); the schedule ends before
    it."""
    horizon: int = 0
    """Number of steps that the schedule and zero_last refer to; 0 takes that of the run."""
    module: str | None = None
    """Python module that registers laws of your own; imported in every process, on every node."""

    def __post_init__(self) -> None:
        LAWS.check(self.law, self.module)
        if self.rate is not None and not (is_number(self.rate) and self.rate >= 0):
            raise InvalidValue(
                f"balance.rate ({self.rate!r:.60}) must be a finite number, at least 0; the law's own is "
                f"{self.entry.rate}"
            )
        if self.schedule not in ("constant", "linear", "cosine"):
            raise InvalidValue(f"balance.schedule is {self.schedule!r:.60}; it must be constant, linear or cosine")
        if not (is_number(self.zero_last) and 0 <= self.zero_last <= 1):
            raise InvalidValue(
                f"balance.zero_last ({self.zero_last!r:.60}) must be between 0 and 1; 0.034 in DeepSeek-V3"
            )
        if type(self.horizon) is not int or self.horizon < 0:
            raise InvalidValue(
                f"balance.horizon ({self.horizon!r:.60}) must be a whole number of steps, 0 for those of the run"
            )
        options = checked_options("balance.options", f"law {self.law!r}", self.options, self.entry.options)
        object.__setattr__(self, "options", options)

    @property
    def entry(self) -> LawEntry:
        """The law as it was registered."""
        return LAWS.find(self.law, self.module)

    @property
    def needs_horizon(self) -> bool:
        """Whether the rate depends on the length of the run."""
        return self.schedule != "constant" or self.zero_last > 0

    def rate_at(self, step: int) -> float:
        """Return the rate of the update after `step`, counted from 1. If `needs_horizon`, `horizon` must be set."""
        rate = self.entry.rate if self.rate is None else self.rate
        if not self.needs_horizon:
            return rate
        end = self.horizon * (1 - self.zero_last)
        if step >= end:
            return 0.0
        left = 1 - step / end
        return {"constant": rate, "linear": rate * left, "cosine": rate * (1 - math.cos(math.pi * left)) / 2}[
            self.schedule
        ]


@dataclass(frozen=True)
class LawState:
    """All that a law carries from step to step.

    bias_N: fp32 (N,), the current bias. extras: further state by name (momentum, averages), fp32 or int64: (N,) if it
    is kept for each expert, else one number for each layer.
    """

    bias_N: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def copy(self) -> "LawState":
        """A state that shares no memory with this one."""
        return LawState(self.bias_N.clone(), {name: value.clone() for name, value in self.extras.items()})

    def to_wire(self) -> dict[str, Any]:
        """The state as plain str, bytes and lists, which msgpack can carry; no pickle."""
        return {"bias": _pack(self.bias_N), "extras": {name: _pack(value) for name, value in self.extras.items()}}

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> "LawState":
        """Read what `to_wire` wrote. Raises ValueError on an unknown dtype or a length that does not fit it."""
        return LawState(_unpack(wire["bias"]), {name: _unpack(value) for name, value in wire["extras"].items()})


class Law:
    """A balancing rule applied to the layers of one layout; see `dispatch.laws.register_law` for rules of your own.

    Raises:
        InvalidValue: the config's rate depends on the length of the run, and its horizon is 0.
    """

    def __init__(self, config: BalanceConfig, layout: LoadLayout) -> None:
        if config.needs_horizon and not config.horizon:
            raise InvalidValue(
                f"balance.schedule {config.schedule} with balance.zero_last {config.zero_last} needs the length of the "
                "run: set balance.horizon to its number of steps"
            )
        self.config, self.layout, self.entry = config, layout, config.entry
        self.statistic = make_statistic(self.entry.statistic) if self.entry.statistic else None
        self._width = self.statistic.width if self.statistic else 0
        self._options = {**self.entry.options, **config.options}

    @property
    def num_counts(self) -> int:
        """M: the length of the counts vector, which has the load of all layers, then each layer's (E, W) statistic."""
        return self.layout.total * (1 + self._width)

    def initial_state(self) -> LawState:
        """The state that a run begins with: bias 0, and the law's initial extras."""
        total, num_layers = self.layout.total, len(self.layout.names)
        sizes = [(total, self.entry.per_expert), (num_layers, self.entry.per_layer)]
        extras = {
            name: torch.full((size,), value, dtype=torch.float32)
            for size, initial in sizes
            for name, value in initial.items()
        }
        return LawState(torch.zeros(total, dtype=torch.float32), extras)

    def fits(self, state: LawState) -> bool:
        """Whether the state belongs to this law on these layers: the same vectors by name, dtype and length."""

        def dtypes_and_shapes(state: LawState) -> tuple[Any, dict[str, Any]]:
            extras = {name: (value.dtype, value.shape) for name, value in state.extras.items()}
            return (state.bias_N.dtype, state.bias_N.shape), extras

        return dtypes_and_shapes(state) == dtypes_and_shapes(self.initial_state())

    def check_state(self, state: LawState) -> None:
        """Refuse a state that this law cannot continue.

        Raises:
            InvalidValue: the state belongs to another law or to other layers.
            ValueError: its bias is not finite.
        """
        if not self.fits(state):
            own = self.initial_state()
            raise InvalidValue(
                f"a law state with {len(state.bias_N)} biases and {sorted(state.extras)} does not fit this run's law, "
                f"which has {len(own.bias_N)} and {sorted(own.extras)}; keep the balance and model settings of the run "
                "that saved it"
            )
        if not bool(state.bias_N.isfinite().all()):
            raise ValueError("the bias is not finite; initialise or load the model before the control loop")

    def update(self, counts_M: Tensor, state: LawState, step: int) -> LawState:
        """The state after a step. Does not modify its arguments.

        Args:
            counts_M: int64 (M,), the sum over all ranks of `dispatch.balance.read_counts`. The first N are the load.
            state: the state whose bias routed the step.
            step: counted from 1.

        A layer that is not balanced, or that no token went through, keeps its state.
        """
        self._check(counts_M, state)
        rate = self.config.rate_at(step)
        if rate == 0:
            return state
        load_N, statistic_NW = counts_M[: self.layout.total], counts_M[self.layout.total :].view(-1, self._width or 1)
        bias_N, extras = state.bias_N.clone(), {name: value.clone() for name, value in state.extras.items()}
        for layer, experts in self._active(load_N):
            load = LayerLoad(load_N[experts], statistic_NW[experts] if self._width else statistic_NW[:0])
            parts = {name: experts if name in self.entry.per_expert else slice(layer, layer + 1) for name in extras}
            # Rules compute in float64; the state is rounded to fp32 once, below.
            before = LayerState(bias_N[experts].double(), {name: extras[name][parts[name]].double() for name in extras})
            after = self.entry.rule(load, before, rate, **self._options)
            bias_N[experts] = (_rescaled if self.entry.multiplies else _centred)(after.bias_E)
            for name, part in parts.items():
                extras[name][part] = after.extras[name].float()
        return LawState(bias_N, extras)

    def _active(self, load_N: Tensor) -> Iterator[tuple[int, slice]]:
        """Each layer to update, and the slice of its experts."""
        for layer, (experts, balanced) in enumerate(zip(self.layout.slices, self.layout.balanced, strict=True)):
            if balanced and bool(load_N[experts].any()):
                yield layer, experts

    def _check(self, counts_M: Tensor, state: LawState) -> None:
        if counts_M.dtype != torch.int64 or counts_M.shape != (self.num_counts,):
            got = f"{counts_M.dtype} {tuple(counts_M.shape)}"
            raise ValueError(f"counts must be int64 of shape ({self.num_counts},), got {got}")
        if state.bias_N.dtype != torch.float32 or state.bias_N.shape != (self.layout.total,):
            got = f"{state.bias_N.dtype} {tuple(state.bias_N.shape)}"
            raise ValueError(f"bias must be float32 of shape ({self.layout.total},), got {got}")


def _centred(bias_E: Tensor) -> Tensor:
    # Centring changes no choice, since top-k ignores a constant. Without it the mean of the bias would drift, under
    # `sign` by rate * (experts below - experts above the mean load) / E in a step. fsum is exact, where torch's sum
    # depends on the width of the machine's vector units.
    return (bias_E - math.fsum(bias_E.tolist()) / bias_E.numel()).float()


def _rescaled(bias_E: Tensor) -> Tensor:
    # As `_centred`, for score * (1 + bias), where a common factor changes no choice. Factors must stay positive: a
    # negative one would turn the order of the scores round.
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
    if not raw:  # torch makes no tensor of an empty buffer
        return torch.zeros(0, dtype=_WIRE_DTYPES[dtype])
    return torch.frombuffer(bytearray(raw), dtype=_WIRE_DTYPES[dtype])
