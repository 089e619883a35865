"""Which law a run balances with, and how its rate changes over the run."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dispatch.errors import InvalidValue
from dispatch.laws.registry import LAWS, LawEntry


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How the selection bias follows the load."""

    law: str = "adaptive"
    """Rule that turns the load of a step into the next bias; docs/laws.md describes them."""
    rate: float | None = None
    """Step of the bias, in the law's own unit; empty: the law's default."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Further constants of the law, such as {"beta": 0.9}; docs/laws.md lists them."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes over the run: constant, or falling to zero in a line or in half a cosine."""
    zero_last: float = 0.0
    """Share of the run at its end in which the bias rests (0.034 in DeepSeek-V3); the schedule ends before it."""
    horizon: int = 0
    """Steps that the schedule reckons with; 0 takes those of the run."""
    module: str | None = None
    """Python module that registers laws of your own; imported in every process, on every node."""

    def __post_init__(self) -> None:
        if self.module:
            _import(self.module)
        if self.law not in LAWS:
            known = ", ".join(sorted(LAWS))
            raise InvalidValue(f"balance.law is {self.law!r}; it must be one of {known}, or come with balance.module")
        if self.rate is not None and not (_is_number(self.rate) and self.rate >= 0):
            raise InvalidValue(
                f"balance.rate ({self.rate}) must be a finite number, at least 0; the law's own is {self.entry.rate}"
            )
        if self.schedule not in ("constant", "linear", "cosine"):
            raise InvalidValue(f"balance.schedule is {self.schedule!r}; it must be constant, linear or cosine")
        if not (_is_number(self.zero_last) and 0 <= self.zero_last <= 1):
            raise InvalidValue(f"balance.zero_last ({self.zero_last}) must be between 0 and 1; 0.034 in DeepSeek-V3")
        if type(self.horizon) is not int or self.horizon < 0:
            raise InvalidValue(
                f"balance.horizon ({self.horizon}) must be a whole number of steps, 0 for those of the run"
            )
        self._check_options()

    def _check_options(self) -> None:
        known = self.entry.options
        if not isinstance(self.options, Mapping):
            raise InvalidValue(f"balance.options is {self.options!r}; it must hold names and numbers, as {{beta: 0.9}}")
        for name, value in self.options.items():
            if name not in known:
                listing = f"knows {', '.join(sorted(known))}" if known else "has no options"
                raise InvalidValue(f"balance.options has {name!r}, but law {self.law!r} {listing}")
            if not _is_number(value):
                raise InvalidValue(f"balance.options.{name} ({value!r}) must be a finite number; default {known[name]}")
        # In one order and one type, so that equal settings have equal bytes on the wire.
        object.__setattr__(self, "options", {name: float(self.options[name]) for name in sorted(self.options)})

    @property
    def entry(self) -> LawEntry:
        """The registered law."""
        if self.law not in LAWS and self.module:
            _import(self.module)  # unpickled in a worker, which did not call __post_init__
        return LAWS[self.law]

    @property
    def needs_horizon(self) -> bool:
        """Whether the rate depends on the length of the run."""
        return self.schedule != "constant" or self.zero_last > 0

    def rate_at(self, step: int) -> float:
        """The rate of the update after `step`, counted from 1. Needs a horizon where `needs_horizon`."""
        rate = self.entry.rate if self.rate is None else self.rate
        if not self.needs_horizon:
            return rate
        end = self.horizon * (1 - self.zero_last)
        if step >= end and (self.zero_last or self.schedule != "constant"):
            return 0.0
        left = 1 - step / end
        return {"constant": rate, "linear": rate * left, "cosine": rate * (1 - math.cos(math.pi * left)) / 2}[
            self.schedule
        ]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type] # the first half says so


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InvalidValue(
            f"balance.module {module!r} cannot be imported: {error}; install it, or put its folder on PYTHONPATH"
        ) from error
