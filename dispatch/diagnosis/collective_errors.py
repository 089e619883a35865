"""The errors of ranks that do not meet in a collective. They hold plain values and survive pickling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def place_text(step: int, phase: str, layer: str) -> str:
    """Text such as `step 120, dispatch of layers.7.moe`; step 0 is before the first step or outside training."""
    where = f"{phase} of {layer}" if layer else phase
    return f"step {step}, {where}" if step else where


class _KeywordError(RuntimeError):
    """An error that is built from keyword arguments, keeps each as an attribute, and is pickled by them.

    By default pickle would call the class with `args`, positionally, which these classes do not take.
    """

    def __reduce__(self) -> Any:
        return _build, (type(self), vars(self).copy())


class CollectiveTimeout(_KeywordError):
    """A collective did not end within its bound.

    step, layer, phase: where the waiting ranks are; layer is "" outside MoE layers. waited_s: seconds so far.
    missing_ranks: global ranks that did not start it; None where only one rank's view is known. setting: the name of
    the setting of the bound. details: lines that say where every rank is, and the count matrix of a dispatch.
    """

    def __init__(
        self,
        *,
        step: int,
        layer: str,
        phase: str,
        waited_s: float,
        missing_ranks: Sequence[int] | None,
        setting: str,
        details: str = "",
    ) -> None:
        super().__init__(step, layer, phase)
        self.step, self.layer, self.phase, self.waited_s = step, layer, phase, waited_s
        self.missing_ranks = None if missing_ranks is None else tuple(missing_ranks)
        self.setting, self.details = setting, details

    def __str__(self) -> str:
        text = f"{place_text(self.step, self.phase, self.layer)}: no end after {self.waited_s:.1f} s"
        if self.missing_ranks:
            text += f"; missing: {ranks_text(self.missing_ranks)}"
        elif self.missing_ranks is not None:
            text += "; all its ranks are in it"
        text += f"; if it only needs longer, raise {self.setting}"
        return f"{text}\n{self.details}" if self.details else text


class WrongSplits(_KeywordError):
    """A rank was about to send other numbers of rows than it had announced; nothing was sent.

    announced, sent: the rows to each rank of the group, 0 to itself.
    """

    def __init__(
        self, *, step: int, layer: str, phase: str, rank: int, announced: Sequence[int], sent: Sequence[int]
    ) -> None:
        super().__init__(step, layer, phase, rank)
        self.step, self.layer, self.phase, self.rank = step, layer, phase, rank
        self.announced, self.sent = list(announced), list(sent)

    def __str__(self) -> str:
        return (
            f"{place_text(self.step, self.phase, self.layer)}: rank {self.rank} was about to send {self.sent} rows to "
            f"the ranks of its group, but had announced {self.announced}; nothing was sent. Plan and exchange of a "
            "dispatcher disagree: a bug in it, or in what it was given"
        )


class RanksDiverged(_KeywordError):
    """Ranks met in one exchange at different steps or layers: one of them left out a layer or a step.

    ranks: global ranks that are not where most are; where there is no majority, those that are ahead.
    """

    def __init__(self, *, step: int, layer: str, phase: str, ranks: Sequence[int], details: str) -> None:
        super().__init__(step, layer, phase)
        self.step, self.layer, self.phase, self.ranks, self.details = step, layer, phase, tuple(ranks), details

    def __str__(self) -> str:
        return (
            f"{place_text(self.step, self.phase, self.layer)}: {ranks_text(self.ranks)} left something out: "
            f"{self.details}. All ranks must run the same layers and steps"
        )


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 1, 3`; at most eight ranks, then the number of the others."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    return kind(**values)
