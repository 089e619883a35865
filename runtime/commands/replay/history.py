"""Recomputes the bias of a run from its recorded counts. The law is a pure function, so no bit may differ."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dispatch.laws import Law, LawState
from dispatch.layout import LoadLayout
from runtime.commands.replay.starts import BalanceStart, balance_at, read_starts
from workers.record.run_log import read_load_history, read_metrics
from workers.record.statistic_log import STATISTICS, StatisticHistory


@dataclass(frozen=True)
class Reproduction:
    """How far the recorded bias follows from the recorded counts.

    num_equal: number of steps, from the first on, whose bias was reproduced bit for bit. problem: why it is less than
    num_steps; None where it is not.
    """

    num_steps: int
    num_equal: int
    problem: str | None

    @property
    def is_exact(self) -> bool:
        """Every recorded step was reproduced."""
        return self.num_equal == self.num_steps

    def __str__(self) -> str:
        """One line for the terminal."""
        line = f"the run's own bias: {self.num_equal} of {self.num_steps} steps reproduced bit for bit"
        return f"{line}; {self.problem}" if self.problem else line


def reproduce_bias(run: Path) -> Reproduction:
    """Apply the run's law to the counts of every step, from the first on, and compare with the bias that it used.

    Raises:
        InvalidValue: `run` is no run, or a record of it is damaged.
    """
    history = read_load_history(run)
    steps = history.steps.tolist()
    laws = _Laws(history.layout, read_starts(run) if steps else [])
    statistics = StatisticHistory(run)
    skipped = {line["step"] for line in read_metrics(run)[0] if line.get("skipped")}
    state: LawState | None = None
    for index, step in enumerate(steps):
        if step != index + 1:
            return Reproduction(len(steps), index, f"the record of step {index + 1} is missing")
        law = laws.at(step)
        state = state or law.initial_state()
        # As bytes: -0.0 and 0.0 are equal as numbers.
        if state.bias_N.numpy().tobytes() != history.bias[index].tobytes():
            return Reproduction(len(steps), index, f"step {step} was routed by another bias")
        if step == steps[-1]:
            break  # the bias that follows from it has not been recorded yet
        if law.statistic and step not in statistics:
            return Reproduction(len(steps), index + 1, f"{run / STATISTICS} has no record of step {step}")
        if step not in skipped:
            state = law.update(_counts(history.counts[index], statistics.get(step)), state, step)
    return Reproduction(len(steps), len(steps), None)


class _Laws:
    """The law of each step; one object for all steps of a start."""

    def __init__(self, layout: LoadLayout, starts: list[BalanceStart]) -> None:
        self._layout, self._starts = layout, starts
        self._last: Law | None = None

    def at(self, step: int) -> Law:
        balance = balance_at(self._starts, step)
        if self._last is None or self._last.config != balance:
            self._last = Law(balance, self._layout)
        return self._last


def _counts(load_N: NDArray[np.int64], statistic: NDArray[np.int64] | None) -> torch.Tensor:
    """What the law was given: int64 (M,), the loads and then the counts of its statistic, if it has one."""
    parts = [torch.from_numpy(load_N.astype("int64"))]
    if statistic is not None:
        parts.append(torch.from_numpy(statistic))
    return torch.cat(parts)
