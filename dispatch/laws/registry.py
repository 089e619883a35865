"""What a law is, and the names that choose one.

Shapes: E experts of one layer, W integers an expert of the law's statistic (0 without one).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from dispatch.errors import InvalidValue

# The per-layer extra of this name reaches the routers with the bias: a statistic may depend on it.
STATISTIC_SCALE = "statistic_scale"


@dataclass(frozen=True)
class LayerLoad:
    """What one layer did in one step, over all ranks.

    tokens_E: int64 (E,), the tokens that chose each expert. statistic_EW: int64 (E, W), of the law's statistic.
    """

    tokens_E: Tensor
    statistic_EW: Tensor


@dataclass(frozen=True)
class LayerState:
    """Bias and further state of one layer, float64 for the computation.

    bias_E: (E,), what routed the step. extras: by name, (E,) where registered per expert, (1,) where per layer.
    """

    bias_E: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def moved_by(self, delta_E: Tensor, **extras: Tensor) -> "LayerState":
        """The bias plus `delta_E`, and some extras replaced."""
        return LayerState(self.bias_E + delta_E, {**self.extras, **extras})


Rule = Callable[..., LayerState]
AnyRule = TypeVar("AnyRule", bound=Rule)


@dataclass(frozen=True, kw_only=True)
class LawEntry:
    """A law as registered.

    rule: (load, state, rate, **options) -> LayerState. rate: default step. options: constants of the rule and their
    defaults. per_expert, per_layer: initial values of its extras. statistic: name in dispatch.statistics, or None.
    multiplies: experts are chosen by score * (1 + bias) instead of score + bias. group_limited: fit for it.
    """

    name: str
    rule: Rule
    rate: float
    options: Mapping[str, float]
    per_expert: Mapping[str, float]
    per_layer: Mapping[str, float]
    statistic: str | None
    multiplies: bool
    group_limited: bool

    @property
    def summary(self) -> str:
        """First line of the rule's docstring."""
        return (self.rule.__doc__ or "").partition("\n")[0]


LAWS: dict[str, LawEntry] = {}


def register_law(
    name: str,
    *,
    rate: float,
    per_expert: Mapping[str, float] | None = None,
    per_layer: Mapping[str, float] | None = None,
    statistic: str | None = None,
    multiplies: bool = False,
    group_limited: bool = True,
) -> Callable[[AnyRule], AnyRule]:
    """Make a rule a law that `balance.law` can name; its keyword-only arguments become `balance.options`.

    The rule is called once a step for each balanced layer that routed a token:

        rule(load: LayerLoad, state: LayerState, rate: float, *, option: float = 1.0) -> LayerState

    It must be pure: the same bits for the same arguments, nothing modified. The bias that it returns is then centred
    (divided by the mean of 1 + bias where the law multiplies) and rounded to fp32. A rate of 0 never calls it: the
    state stays. See `LawEntry` for the arguments here; the initial bias is 0.
    """

    def register(rule: AnyRule) -> AnyRule:
        known = LAWS.get(name)
        if known is not None and (known.rule.__module__, known.rule.__qualname__) != (
            rule.__module__,
            rule.__qualname__,
        ):
            raise InvalidValue(f"law {name!r} is registered already, by {known.rule.__module__}; choose another name")
        parameters = inspect.signature(rule).parameters.values()
        LAWS[name] = LawEntry(
            name=name,
            rule=rule,
            rate=rate,
            options={each.name: float(each.default) for each in parameters if each.kind is each.KEYWORD_ONLY},
            per_expert=dict(per_expert or {}),
            per_layer=dict(per_layer or {}),
            statistic=statistic,
            multiplies=multiplies,
            group_limited=group_limited,
        )
        return rule

    return register
