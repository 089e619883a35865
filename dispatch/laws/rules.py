"""Balancing rules: their form, their registration as laws, and the rules that come with Trimtab (docs/laws.md).

Shapes: E experts of one layer, W integers per expert of the law's statistic (0 without one). In the comments of the
rules c is the load of an expert, m the mean load of its layer, b the expert's bias, v = (m - c) / m its relative lack
of load: positive where it has too little.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from dispatch.registry import Registry, options_of
from dispatch.routing.statistics import histogram_range

# A per-layer extra with this name is written to the routers together with the bias, for the statistic to use.
STATISTIC_SCALE = "statistic_scale"


@dataclass(frozen=True)
class LayerLoad:
    """What the routers of one layer counted in one step, summed over all ranks: the input of a law."""

    tokens_E: Tensor
    """Tokens that chose each expert: int64 (num_experts,)."""
    statistic_EW: Tensor
    """What the law's statistic counted: int64 (num_experts, W); W is 0 for a law without one."""


@dataclass(frozen=True)
class LayerState:
    """Bias and further state of one layer: what a law takes and returns."""

    bias_E: Tensor
    """The selection bias that routed the step: float64 (num_experts,)."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further state by name, float64: (num_experts,) if registered in `per_expert`, (1,) if in `per_layer`."""

    def moved_by(self, delta_E: Tensor, **extras: Tensor) -> "LayerState":
        """Return a new state: the bias plus `delta_E`, and the named extras replaced."""
        return LayerState(self.bias_E + delta_E, {**self.extras, **extras})


Rule = Callable[..., LayerState]
AnyRule = TypeVar("AnyRule", bound=Rule)


@dataclass(frozen=True, kw_only=True)
class LawEntry:
    """A law as registered; `register_law` describes the fields.

    rule: (load, state, rate, **options) -> LayerState. options: the rule's keyword-only arguments and their defaults.
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


LAWS: Registry[LawEntry] = Registry("balance.law")


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
    """Register the decorated function, a rule, as a law that `balance.law` can name.

    The rule is called once a step for each balanced layer that routed a token, with a `LayerLoad`, a `LayerState` and
    the rate of the step, and returns the next `LayerState`. Its keyword-only arguments, which are floats with
    defaults, become `balance.options`. It must be pure: the same bits for the same arguments, and nothing modified.
    The returned bias is then centred to mean zero (if the law multiplies, divided by the mean of 1 + bias) and rounded
    to fp32. The first bias is 0. With a rate of 0 the rule is not called, and the state stays.

    Args:
        name: the value of `balance.law`.
        rate: default of `balance.rate`, in the unit of the rule.
        per_expert: names and initial values of further state, one number for each expert.
        per_layer: names and initial values of further state, one number for the layer.
        statistic: what the routers count beside the load: "near_cutoff" or "cutoff_histogram"; None for nothing.
        multiplies: experts are chosen by score * (1 + bias) instead of score + bias.
        group_limited: whether the law also balances routing that is limited to groups of experts.
    Raises:
        InvalidValue: another function is registered under this name.

    Examples:
        >>> from dispatch import LayerLoad, LayerState, register_law
        >>> @register_law("lack", rate=0.01)
        ... def lack(load: LayerLoad, state: LayerState, rate: float, *, power: float = 1.0) -> LayerState:
        ...     mean = load.tokens_E.double().mean()
        ...     lack_E = (mean - load.tokens_E) / mean
        ...     return state.moved_by(rate * lack_E.sign() * lack_E.abs() ** power)

        >>> import torch
        >>> load = LayerLoad(torch.tensor([30, 10]), statistic_EW=torch.zeros(2, 0, dtype=torch.int64))
        >>> lack(load, LayerState(torch.zeros(2, dtype=torch.float64)), rate=0.01).bias_E
        tensor([-0.0050,  0.0050], dtype=torch.float64)
    """

    def register(rule: AnyRule) -> AnyRule:
        entry = LawEntry(
            name=name,
            rule=rule,
            rate=rate,
            options=options_of(rule),
            per_expert=dict(per_expert or {}),
            per_layer=dict(per_layer or {}),
            statistic=statistic,
            multiplies=multiplies,
            group_limited=group_limited,
        )
        LAWS.register(name, entry, rule)
        return rule

    return register


@register_law("none", rate=0.0)
def none(load: LayerLoad, state: LayerState, rate: float) -> LayerState:  # noqa: ARG001 - the form of a rule
    """The bias stays: for comparison, and for models that are not to change."""
    return state


@register_law("sign", rate=1e-3)
def sign(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """A step of fixed size against the load: the published rule (arXiv 2408.15664, algorithm 1; DeepSeek-V3)."""
    # b += rate * sign(m - c)
    return state.moved_by(rate * _direction(load))


@register_law("proportional", rate=1e-2)
def proportional(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """Steps, b += rate * v, in proportion to the relative lack (arXiv 2408.15664, table 3)."""
    return state.moved_by(rate * _relative_lack(load))


@register_law("multiplicative", rate=1e-3, multiplies=True)
def multiplicative(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """Chooses by score * (1 + b), b += rate * sign(m - c) (arXiv 2408.15664, table 4)."""
    return state.moved_by(rate * _direction(load))


@register_law("rms", rate=3e-3)
def rms(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """A step of fixed length along the lack of load (kexue.fm 10757)."""
    # b += rate * v / rms(v)
    lack_E = _relative_lack(load)
    length = math.sqrt(math.fsum((lack_E * lack_E).tolist()) / lack_E.numel())
    return state.moved_by(rate / length * lack_E) if length else state


@register_law("smebu", rate=5e-4, per_expert={"momentum": 0.0})
def smebu(load: LayerLoad, state: LayerState, rate: float, *, kappa: float = 2.0, beta: float = 0.5) -> LayerState:
    """Momentum of centred rate * tanh(kappa * v) (SMEBU of Trinity Large, arXiv 2602.17004)."""
    # math.tanh, not torch's, whose last bit depends on the width of the machine's vector units.
    step_E = torch.tensor(
        [rate * math.tanh(kappa * lack) for lack in _relative_lack(load).tolist()], dtype=torch.float64
    )
    step_E = step_E - math.fsum(step_E.tolist()) / step_E.numel()
    momentum_E = beta * state.extras["momentum"] + (1 - beta) * step_E
    return state.moved_by(momentum_E, momentum=momentum_E)


@register_law("quantile", rate=1.0, statistic="cutoff_histogram", group_limited=False)
def quantile(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """The bias with which each expert would have had the mean load, the cutoffs of the step as they were.

    Kimi K3's form of quantile balancing (kexue.fm 11619; Megatron-LM #6637): a quantile of one histogram over the whole
    global batch, never an average of quantiles. Moves by `rate` of the way, 1 for all of it.
    """
    return state.moved_by(rate * (_quantile_bias(load, state) - state.bias_E))


# Not for group-limited routing: near_cutoff counts within the groups of a token, but a bias also moves whole groups in
# and out. With 32 experts in 4 or 8 groups the load changed up to 6.5 times as much as the count predicts. Where it is
# more than 4 times, a step at rate 0.5 overshoots by more than it corrects, and the bias swings for ever.
@register_law("newton", rate=0.5, statistic="near_cutoff", per_layer={STATISTIC_SCALE: 0.02}, group_limited=False)
def newton(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """A part of the Newton step: the lack of load over the slope of the load by the bias (ours, docs/laws.md)."""
    scale, next_scale = _scales(load, state)
    step_E = rate * _relative_lack(load) / _usable(_slope(load, scale), scale)
    return state.moved_by(_trusted(step_E, next_scale), **{STATISTIC_SCALE: _scalar(next_scale)})


@register_law(
    "adaptive",
    rate=1.0,
    statistic="near_cutoff",
    per_expert={"lack": 0.0, "slope": 0.0},
    per_layer={STATISTIC_SCALE: 0.02, "gain": 1.0, "noise": 0.0},
)
def adaptive(
    load: LayerLoad, state: LayerState, rate: float, *, least_gain: float = 0.1, shift_ratio: float = 10.0
) -> LayerState:
    """Newton steps of a length that follows how predictable the load is (ours, docs/laws.md).

    The lack of load in a step is the error of the bias plus the chance of one batch: an innovation in the sense of
    Kalman. With the best gain innovations are white (Mehra 1970). So the gain grows where two innovations in a row
    point the same way, and shrinks where they do not. An innovation far above the usual size means that the data have
    shifted: the law starts anew, with a whole step.
    """
    gain, noise = float(state.extras["gain"]), float(state.extras["noise"])
    lack_E, before_E = _relative_lack(load), state.extras["lack"]
    size = _mean_product(lack_E, lack_E)
    starts = noise == 0 or size > shift_ratio * noise
    if starts:
        gain, noise = 1.0, size
    else:
        noise += 0.2 * (size - noise)  # an average over about five steps, as that of the slope below
        norm = math.sqrt(size * _mean_product(before_E, before_E))
        correlation = _mean_product(lack_E, before_E) / norm if norm else 0.0
        # Without correlation gains fall as 1, 2/3, 1/2, 2/5, ..., as when one averages over more and more steps.
        gain = min(max(gain * (1 + correlation) / (1 + gain / 2), least_gain), 1.0)
    scale, next_scale = _scales(load, state)
    slope_E, average_E = _slope(load, scale), state.extras["slope"]
    # One step's estimate of the slope is correlated with the noise of its load, since chance that gives an expert more
    # tokens also brings tokens near its cutoff. Therefore it is averaged over steps.
    slope_E = slope_E if starts else average_E + 0.2 * (slope_E - average_E)
    step_E = _trusted(rate * gain * lack_E / _usable(slope_E, scale), next_scale)
    scalars = {STATISTIC_SCALE: _scalar(next_scale), "gain": _scalar(gain), "noise": _scalar(noise)}
    return state.moved_by(step_E, lack=lack_E, slope=slope_E, **scalars)


@register_law(
    "warm",
    rate=1e-3,
    statistic="cutoff_histogram",
    per_layer={"num_calm_steps": 0.0, "noise": 0.0},
    group_limited=False,
)
def warm(
    load: LayerLoad, state: LayerState, rate: float, *, warm_steps: float = 3.0, shift_ratio: float = 10.0
) -> LayerState:
    """`quantile` for the first steps and after a shift of the load, `sign` otherwise (docs/laws.md)."""
    num_calm_steps, noise = float(state.extras["num_calm_steps"]), float(state.extras["noise"])
    lack_E = _relative_lack(load)
    size = _mean_product(lack_E, lack_E)
    if noise > 0 and size > shift_ratio * noise:
        num_calm_steps, noise = 0.0, 0.0
    if num_calm_steps < warm_steps:
        step_E = _quantile_bias(load, state) - state.bias_E
    else:
        noise = noise + 0.2 * (size - noise) if noise else size
        step_E = rate * _direction(load)
    return state.moved_by(step_E, num_calm_steps=_scalar(num_calm_steps + 1), noise=_scalar(noise))


def _quantile_bias(load: LayerLoad, state: LayerState) -> Tensor:
    """The bias that would have given each expert the mean load, float64 (E,), centred.

    The current bias is centred too, so that a part of the way between them has no part that all experts share.
    """
    low, high = histogram_range(state.bias_E.float())  # fp32, as the routers that filled the bins have the bias
    below_EW = load.statistic_EW.cumsum(1)
    # The first bin at which the cumulative count reaches the mean load, total / E, compared in integers. The histogram
    # of an expert has every token once, so the cumulative count is the load that a bias would give.
    num_experts, total = load.tokens_E.numel(), load.tokens_E.sum()
    bin_E1 = (below_EW * num_experts < total).sum(1, keepdim=True).clamp_max(below_EW.shape[1] - 1)
    inside_E1 = load.statistic_EW.gather(1, bin_E1)
    before_E1 = below_EW.gather(1, bin_E1) - inside_E1
    part_E1 = (total.double() / num_experts - before_E1) / inside_E1.clamp_min(1)
    wanted_E = float(low) + (bin_E1 + part_E1).squeeze(1) * (float(high - low) / below_EW.shape[1])
    return wanted_E - math.fsum(wanted_E.tolist()) / num_experts


def _scales(load: LayerLoad, state: LayerState) -> tuple[float, float]:
    """The `scale` of near_cutoff in this step, and the next one: about 0.8 of a load should be within it of the cutoff.

    With few tokens so near the slope is noise; with a wide scale it is no slope at this bias any more. The next scale
    is at most 4 times larger or smaller.
    """
    scale = float(state.extras[STATISTIC_SCALE])
    wanted = math.sqrt(0.8 * float(load.tokens_E.sum()) / max(float(load.statistic_EW.sum()), 1.0))
    return scale, min(max(scale * min(max(wanted, 0.25), 4.0), 1e-6), 0.25)


def _slope(load: LayerLoad, scale: float) -> Tensor:
    """How much each expert's load over the mean load grows for a unit of bias, float64 (E,)."""
    mean = float(load.tokens_E.sum()) / load.tokens_E.numel()
    return load.statistic_EW[:, 0].double() / (2 * scale * mean)


def _usable(slope_E: Tensor, scale: float) -> Tensor:
    """Clamp slopes away from 0: an expert with no token near its cutoff moves as if 1/50 of the mean load were near."""
    return slope_E.clamp_min(0.02 / (2 * scale))


def _trusted(step_E: Tensor, next_scale: float) -> Tensor:
    """Clamp steps to 2.5 times the scale: farther away the slope is not known."""
    return step_E.clamp(-2.5 * next_scale, 2.5 * next_scale)


def _mean_product(a_E: Tensor, b_E: Tensor) -> float:
    return math.fsum((a_E * b_E).tolist()) / a_E.numel()


def _scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _direction(load: LayerLoad) -> Tensor:
    # In integers, as sign(total - E * c): a rounded mean can turn the sign round (Megatron-LM #7081).
    return torch.sign(load.tokens_E.sum() - load.tokens_E.numel() * load.tokens_E).double()


def _relative_lack(load: LayerLoad) -> Tensor:
    """v, float64 (E,). The difference is taken in integers, and so is exact."""
    total = load.tokens_E.sum()
    return (total - load.tokens_E.numel() * load.tokens_E).double() / total.double()
