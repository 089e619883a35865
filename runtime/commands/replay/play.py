"""Simulates laws on a trace: each chooses experts by its bias and updates it by the load that results, step by step.

Shapes: S steps of the trace, N experts of all layers, T tokens, E experts of a layer, K top-k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispatch.config import RouterConfig
from dispatch.errors import InvalidValue
from dispatch.laws import STATISTIC_SCALE, BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout
from dispatch.routing.selection import biased_scores, count_by_expert, ordered_topk
from dispatch.routing.statistics import RouterChoice
from runtime.commands.replay.trace import Trace


@dataclass(frozen=True)
class SimulatedLaw:
    """The loads and biases of one law on a trace."""

    config: BalanceConfig
    counts: NDArray[np.int64]  # (S, N)
    bias: NDArray[np.float32]  # (S, N), the bias by which each step was routed
    regret: NDArray[np.float64]  # (S,), 1 - sum of the chosen scores / sum of the top-k scores, over all layers


class LawSimulator:
    """Simulates one law. Call `step` for each step of the trace, in order; `result` has all steps so far."""

    def __init__(self, config: BalanceConfig, layout: LoadLayout, router: RouterConfig) -> None:
        self.law: Law = Law(config, layout)
        self.state: LawState = self.law.initial_state()
        self._layout, self._router = layout, router
        self._rows: list[tuple[Tensor, Tensor, float]] = []

    def step(self, step: int, scores: list[Tensor]) -> None:
        """Choose by the law's bias and update it, as a training step would."""
        loads, statistics, chosen, best = [], [], 0.0, 0.0
        for layer, (where, scores_TE) in enumerate(zip(self._layout.slices, scores, strict=True)):
            routing = self._route(layer, scores_TE, self.state.bias_N[where])
            loads.append(count_by_expert(routing.topk_ids_TK, scores_TE.shape[1]))
            if self.law.statistic is not None:
                statistics.append(self.law.statistic.count(routing, None).flatten())
            # float64: the regret is a small difference of two sums over all tokens.
            chosen += float(scores_TE.gather(1, routing.topk_ids_TK).sum(dtype=torch.float64))
            best += float(scores_TE.topk(self._router.top_k, dim=1).values.sum(dtype=torch.float64))
        load_N = torch.cat(loads)
        self._rows.append((load_N, self.state.bias_N, 1 - chosen / best if best else 0.0))
        self.state = self.law.update(torch.cat([load_N, *statistics]), self.state, step)

    def _route(self, layer: int, scores_TE: Tensor, bias_E: Tensor) -> RouterChoice:
        router = self._router
        biased_TE = biased_scores(scores_TE, bias_E, multiplies=self.law.entry.multiplies, **router.groups)
        scales = self.state.extras.get(STATISTIC_SCALE)
        scale = torch.zeros(()) if scales is None else scales[layer]
        return RouterChoice(scores_TE, biased_TE, ordered_topk(biased_TE, router.top_k), bias_E, scale)

    def result(self) -> SimulatedLaw:
        """Return the steps so far."""
        loads, biases, regrets = zip(*self._rows, strict=True)
        return SimulatedLaw(
            self.law.config, torch.stack(loads).numpy(), torch.stack(biases).numpy(), np.array(regrets, np.float64)
        )


def simulate_laws(
    trace: Trace, laws: Mapping[str, BalanceConfig], on_step: Callable[[int], None] = lambda _: None
) -> dict[str, SimulatedLaw]:
    """Simulate all laws together, so that the scores of a step are read once. `on_step` is called after each step.

    Raises:
        InvalidValue: the trace routes by groups and a law cannot.
    """
    for config in laws.values():
        if trace.router.num_groups > 1 and not config.entry.group_limited:
            raise InvalidValue(
                f"law {config.law!r} is not fit for routing that is limited to groups, as {trace.name} is; leave it out"
            )
    players = {label: LawSimulator(config, trace.layout, trace.router) for label, config in laws.items()}
    for step in trace.steps:
        scores = trace.scores(step)
        for player in players.values():
            player.step(step, scores)
        on_step(step)
    return {label: player.result() for label, player in players.items()}


def max_vio_by_step(counts: NDArray[np.int64], slices: tuple[slice, ...]) -> NDArray[np.float64]:
    """MaxVio of every step, mean over the layers: (S,)."""
    return np.asarray(np.mean([max_vio_of_rows(counts[:, where]) for where in slices], axis=0), np.float64)


def max_vio_of_rows(loads: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """MaxVio of each row, from the loads of all experts of a layer in its columns; -1 for a row without load."""
    return np.asarray(loads.max(1) / np.maximum(loads.mean(1), 1e-300) - 1, np.float64)
