"""The laws that come with Trimtab. Formulas and sources: docs/laws.md.

Shapes: E experts of one layer. In the comments c is the load of an expert, m the mean load of its layer, b its bias,
v = (m - c) / m its relative lack of load.
"""

import math

import torch
from torch import Tensor

from dispatch.laws.registry import STATISTIC_SCALE, LayerLoad, LayerState, register_law
from dispatch.statistics import histogram_range


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
    # math.tanh, not torch's: that one has another last bit with another vector width.
    step_E = torch.tensor(
        [rate * math.tanh(kappa * lack) for lack in _relative_lack(load).tolist()], dtype=torch.float64
    )
    step_E = step_E - math.fsum(step_E.tolist()) / step_E.numel()
    momentum_E = beta * state.extras["momentum"] + (1 - beta) * step_E
    return state.moved_by(momentum_E, momentum=momentum_E)


def _direction(load: LayerLoad) -> Tensor:
    # In integers, as sign(total - E * c): a mean in floating point has flipped it (Megatron-LM #7081).
    return torch.sign(load.tokens_E.sum() - load.tokens_E.numel() * load.tokens_E).double()


def _relative_lack(load: LayerLoad) -> Tensor:
    """v, float64 (E,). The difference is taken in integers."""
    total = load.tokens_E.sum()
    return (total - load.tokens_E.numel() * load.tokens_E).double() / total.double()


@register_law("quantile", rate=1.0, statistic="cutoff_histogram", group_limited=False)
def quantile(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """The bias with which each expert would have got the mean load, the cutoffs of the step as they were.

    Kimi K3's form of quantile balancing (kexue.fm 11619; Megatron-LM #6637): a quantile of one histogram over the whole
    global batch, never an average of quantiles. Moves by `rate` of the way, 1 for all of it.
    """
    low, high = histogram_range(state.bias_E.float())
    below_EW = load.statistic_EW.cumsum(1)
    # Exact: the mean load of the layer is total / E, and the histogram of an expert holds every token once.
    num_experts, total = load.tokens_E.numel(), load.tokens_E.sum()
    bin_E1 = (below_EW * num_experts < total).sum(1, keepdim=True).clamp_max(below_EW.shape[1] - 1)
    inside_E1 = load.statistic_EW.gather(1, bin_E1)
    before_E1 = below_EW.gather(1, bin_E1) - inside_E1
    part_E1 = (total.double() / num_experts - before_E1) / inside_E1.clamp_min(1)
    wanted_E = float(low) + (bin_E1 + part_E1).squeeze(1) * (float(high - low) / below_EW.shape[1])
    # Centred first: only then is a part of the way no move in common.
    wanted_E = wanted_E - math.fsum(wanted_E.tolist()) / num_experts
    return state.moved_by(rate * (wanted_E - state.bias_E))


@register_law("newton", rate=0.5, statistic="near_cutoff", per_layer={STATISTIC_SCALE: 0.02})
def newton(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """A part of the Newton step: the lack of load over the slope of the load by the bias (ours, docs/laws.md)."""
    scale = float(state.extras[STATISTIC_SCALE])
    mean = float(load.tokens_E.sum()) / load.tokens_E.numel()
    near_E = load.statistic_EW[:, 0].double()
    slope_E = near_E.clamp_min(0.02 * mean) / (2 * scale)
    step_E = (mean - load.tokens_E.double()) / slope_E
    step_E = (rate * step_E).clamp(-2.5 * scale, 2.5 * scale)
    return state.moved_by(step_E, **{STATISTIC_SCALE: _next_scale(scale, near_E, mean)})


def _next_scale(scale: float, near_E: Tensor, mean: float) -> Tensor:
    """Wide enough that about a third of an expert's load is near the cutoff: a slope from few tokens is noise."""
    wanted = math.sqrt(0.4 * mean * near_E.numel() / max(float(near_E.sum()), 1.0))
    return torch.tensor([min(max(scale * min(max(wanted, 0.5), 2.0), 1e-6), 0.25)], dtype=torch.float64)
