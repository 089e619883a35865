"""Computes the figures by which a user compares laws: steps to balance, MaxVio, regret."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.commands.replay.play import SimulatedLaw, max_vio_by_step
from runtime.commands.replay.trace import Trace

MEAN_OVER = 5  # steps that must be within the threshold on average
# Share of the later means that must be within the threshold too: the load of a fresh router is even for some steps,
# which no law has done.
KEPT = 0.5
STEADY_SHARE = 0.25  # of the steps before the shift, at their end


@dataclass(frozen=True, kw_only=True)
class LawFigures:
    """The figures of one law on one trace.

    balanced_after: number of updates before balance, see `first_balanced`; up to the shift; None if never.
    recovered_after: the same, counted from the shift. max_vio_batch, max_vio_global, regret: over the steady
    steps, the last quarter before the shift; MaxVio_global is that of their summed load. regret: share of the best
    scores that the chosen ones lack. Means over layers.
    """

    balanced_after: int | None
    recovered_after: int | None
    max_vio_batch: float
    max_vio_global: float
    regret: float


def figures_of(simulated: SimulatedLaw, trace: Trace, threshold_S: NDArray[np.float64]) -> LawFigures:
    """The figures of one law. threshold_S: (S,), MaxVio_batch that counts as balanced in each step."""
    slices, steps = trace.layout.slices, steady_steps(trace)
    vio_S = max_vio_by_step(simulated.counts, slices)
    steady = slice(steps[0] - trace.steps[0], steps[-1] + 1 - trace.steps[0])
    shift = steady.stop
    share_S = vio_S / threshold_S
    load_1N = simulated.counts[steady].sum(0, keepdims=True)
    return LawFigures(
        balanced_after=first_balanced(share_S[:shift]),
        recovered_after=first_balanced(share_S[shift:]) if shift < len(vio_S) else None,
        max_vio_batch=float(vio_S[steady].mean()),
        max_vio_global=float(max_vio_by_step(load_1N, slices)[0]),
        regret=float(simulated.regret[steady].mean()),
    )


def steady_steps(trace: Trace) -> range:
    """The steps that the steady figures are of: the last quarter of the trace, before the shift if it has one."""
    num_steps = len(trace.steps) if trace.shift_step is None else trace.shift_step - trace.steps[0]
    return trace.steps[num_steps - max(1, round(STEADY_SHARE * num_steps)) : num_steps]


def first_balanced(share_S: NDArray[np.float64]) -> int | None:
    """Index of the first step that begins a balanced window, and from which KEPT of all windows are balanced.

    share_S: MaxVio over its threshold. A window is MEAN_OVER steps; it is balanced if its mean share is at most 1.
    None if there is no such step.
    """
    if len(share_S) < MEAN_OVER:
        return None
    means = np.convolve(share_S, np.full(MEAN_OVER, 1 / MEAN_OVER), "valid")
    within = means <= 1
    num_left = np.arange(len(within), 0, -1)
    below = np.flatnonzero(within & (within[::-1].cumsum()[::-1] >= KEPT * num_left))
    return int(below[0]) if below.size else None
