"""Computes the lowest imbalance that any law could reach on a trace, step by step.

Shapes: S steps of the trace, T tokens, E experts of a layer.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispatch.config import RouterConfig
from dispatch.laws import BalanceConfig, Law
from dispatch.laws.load_metrics import max_vio, max_vio_floor
from dispatch.layout import LoadLayout
from dispatch.routing.selection import biased_scores, count_by_expert, ordered_topk
from runtime.commands.replay.play import LawSimulator
from runtime.commands.replay.trace import Trace

REACH = 6  # steps before and after a step, whose scores give the bias that is tried on it
MIN_NEIGHBOURS = 6
SMOOTHED = 5  # samples in a moving average: a sample, the mean of a few layers, varies by a tenth
STRIDE = 4  # tokens of one sequence resemble each other: the others say little more
NUM_ROUNDS = 8  # updates of the bias; each sees all neighbours
NUM_SAMPLES = 128  # steps whose floor is computed; between them it is interpolated


def floor_by_step(trace: Trace) -> NDArray[np.float64]:
    """The practical floor, (S,): the MaxVio_batch that the best constant bias leaves in a step that it has not seen.

    The bias that balances the REACH steps before and after together is tried on the step. What it leaves is chance
    (more than with independent tokens, as tokens come in sequences), and what changes within REACH steps: much where a
    router is young or the text has just shifted. Computed for NUM_SAMPLES steps and interpolated between them. NaN in
    all steps where the trace, or a side of its shift, has too few steps.
    """
    values = np.full(len(trace.steps), np.nan)
    for side in _sides(trace):
        if len(side) <= MIN_NEIGHBOURS:
            return np.full(len(trace.steps), np.nan)
        wanted = max(2, round(NUM_SAMPLES * len(side) / len(trace.steps)))
        steps = np.unique(np.linspace(side[0], side[-1], min(wanted, len(side))).astype(int))
        sampled = _smoothed(np.array([_floor_of(trace, int(step), side) for step in steps]))
        values[side[0] - trace.steps[0] : side[-1] + 1 - trace.steps[0]] = np.interp(np.array(side), steps, sampled)
    return values


def chance_floor(trace: Trace) -> float:
    """`max_vio_floor` of the last step, mean over layers: what independent tokens would leave."""
    scores = trace.scores(trace.steps[-1])
    return float(np.mean([max_vio_floor(len(each), each.shape[1], trace.router.top_k) for each in scores]))


def _sides(trace: Trace) -> list[range]:
    """Split the steps at the shift: steps on one side say nothing about those on the other."""
    if trace.shift_step is None:
        return [trace.steps]
    at = trace.shift_step - trace.steps[0]
    return [trace.steps[:at], trace.steps[at:]]


def _floor_of(trace: Trace, step: int, side: range) -> float:
    around = [trace.scores(each) for each in side if each != step and abs(each - step) <= REACH]
    values = []
    for layer, scores_TE in enumerate(trace.scores(step)):
        bias_E = _balancing_bias(torch.cat([each[layer][::STRIDE] for each in around]), trace.router)
        biased_TE = biased_scores(scores_TE, bias_E, multiplies=False, **trace.router.groups)
        topk_ids_TK = ordered_topk(biased_TE, trace.router.top_k)
        values.append(max_vio(count_by_expert(topk_ids_TK, scores_TE.shape[1])))
    return float(np.mean(values))


def _balancing_bias(scores_TE: Tensor, router: RouterConfig) -> Tensor:
    """The bias under which these tokens load all experts alike, fp32 (E,): by Newton's law with a falling rate.

    Where groups limit the choice `newton` oscillates: `adaptive`, which finds its own gain, takes its place.
    """
    if router.num_groups > 1:
        config = [BalanceConfig(law="adaptive")] * NUM_ROUNDS
    else:
        config = [BalanceConfig(law="newton", rate=1.0 / (1 + round_ / 4)) for round_ in range(NUM_ROUNDS)]
    layout = LoadLayout(("layer",), (scores_TE.shape[1],), (True,))
    player = LawSimulator(config[0], layout, router)
    for round_, each in enumerate(config, 1):
        player.law = Law(each, layout)
        player.step(round_, [scores_TE])
    return player.state.bias_N


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    kernel = np.ones(min(SMOOTHED, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
