"""Reads a config.json of Hugging Face strictly: errors name a setting that is missing, wrong or not supported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dispatch.errors import InvalidValue
from workers.model.attention import YarnConfig

# Larger than any size of a model, and so small that a product of three sizes, in bytes, fits in 64 bits.
MAX_SIZE = 10**6
MAX_POSITIONS = 10**9
MAX_LAYERS = 1000
MAX_NUMBER = 1e30


@dataclass(frozen=True)
class Settings:
    """The values of one config.json; `where` names it in errors.

    Where the hub and transformers have different names for a setting, pass both: the first that is not null counts.
    `default` is the value of a setting that is missing, and `null` that of one that is null; both must be those of
    transformers. Where `default` or `null` is None, that case is refused.

    All methods raise InvalidValue, which names the setting and the rule.
    """

    values: Mapping[str, Any]
    where: str

    def integer(
        self,
        *names: str,
        default: int | None = None,
        null: int | None = None,
        minimum: int = 0,
        maximum: int = MAX_SIZE,
    ) -> int:
        """A whole number from `minimum` to `maximum`."""
        value = self._first(names, default, null)
        if type(value) is not int or not minimum <= value <= maximum:
            rule = f"it must be a whole number, at least {minimum} and at most {maximum}"
            raise InvalidValue(f"{self.where}: {names[0]} is {value!r:.60}; {rule}")
        return value

    def number(
        self, *names: str, default: float | None = None, null: float | None = None, minimum: float = -MAX_NUMBER
    ) -> float:
        """A number from `minimum` to MAX_NUMBER."""
        value = self._first(names, default, null)
        if type(value) not in (int, float) or not minimum <= value <= MAX_NUMBER:
            rule = f"it must be a number, at least {minimum:g} and at most {MAX_NUMBER:g}"
            raise InvalidValue(f"{self.where}: {names[0]} is {value!r:.60}; {rule}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false; null is false, as in transformers."""
        value = self._first((name,), default, False)
        if not isinstance(value, bool):
            raise InvalidValue(f"{self.where}: {name} is {value!r:.60}; it must be true or false")
        return value

    def expect(self, name: str, *allowed: object) -> None:
        """Refuse values of a setting that are not supported. A missing setting counts as the first allowed value."""
        value = self.values.get(name, allowed[0])
        # 1 is 1.0, but it is not true.
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            supported = " or ".join(map(repr, allowed))
            raise InvalidValue(f"{self.where}: {name} is {value!r:.60}, and only {supported} is supported")

    def inner(self, name: str) -> "Settings":
        """The settings that are grouped under a name."""
        value = self._first((name,), None, None)
        if not isinstance(value, Mapping):
            raise InvalidValue(f"{self.where}: {name} is {value!r:.60}; it must hold names and values")
        return Settings(value, f"{self.where}: {name}")

    def rope_theta(self, default: float) -> float:
        """Base of the rotary angles."""
        inner = Settings(self._rope(), f"{self.where}: rope scaling")
        outer = self.number("rope_theta", default=default, null=default)
        return inner.number("rope_theta", default=outer, null=outer)

    def partial_rotary_factor(self, default: float) -> float:
        """Share of a head's dimensions that are rotated."""
        inner = Settings(self._rope(), f"{self.where}: rope scaling")
        outer = self.number("partial_rotary_factor", default=default, null=default)
        return inner.number("partial_rotary_factor", default=outer, null=outer)

    def yarn(self, *, scales_scores: bool) -> YarnConfig:
        """How rotary positions are stretched: not at all, or by YaRN (arXiv 2309.00071).

        scales_scores: whether the square of the factor from mscale_all_dim multiplies attention scores, as in
            DeepSeek-V3.
        """
        rope = self._rope()
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return YarnConfig()
        if kind != "yarn":
            raise InvalidValue(f"{self.where}: rope scaling is {kind!r:.60}, and only 'default' or 'yarn' is supported")
        inner = Settings(rope, f"{self.where}: rope scaling")
        factor = inner.number("factor")
        mscale_all_dim = inner.number("mscale_all_dim", default=0.0, null=0.0, minimum=0.0)
        return YarnConfig(
            factor=factor,
            original_max_seq_len=inner.integer("original_max_position_embeddings", maximum=MAX_POSITIONS),
            beta_fast=inner.number("beta_fast", default=32.0, null=32.0),
            beta_slow=inner.number("beta_slow", default=1.0, null=1.0),
            truncate=inner.flag("truncate", default=True),
            magnitude=_magnitude(inner, factor, mscale_all_dim),
            score_factor=_mscale(factor, mscale_all_dim) ** 2 if scales_scores and mscale_all_dim else 1.0,
        )

    def _rope(self) -> Mapping[str, Any]:
        """The settings of rotary positions: rope_parameters as transformers 5 writes it, or the older rope_scaling."""
        rope = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise InvalidValue(f"{self.where}: rope scaling is {rope!r:.60}; it must hold names and values")
        if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
            raise InvalidValue(
                f"{self.where}: rope scaling has settings for {nested[0]!r:.60}; only one for all layers is supported"
            )
        return rope

    def _first(self, names: tuple[str, ...], default: Any, null: Any) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        is_present = any(name in self.values for name in names)
        value = null if is_present else default
        if value is None:
            raise InvalidValue(f"{self.where}: {' or '.join(names)} is {'null' if is_present else 'missing'}")
        return value


def _magnitude(rope: Settings, factor: float, mscale_all_dim: float) -> float:
    # As in transformers: attention_factor, else a quotient of two mscales, else 0.1 ln(factor) + 1 as in the paper.
    mscale = rope.number("mscale", default=0.0, null=0.0, minimum=0.0)
    is_quotient = mscale and mscale_all_dim
    derived = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim) if is_quotient else _mscale(factor, 1.0)
    return rope.number("attention_factor", default=derived, null=derived)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
