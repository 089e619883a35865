"""Compares the best law with the sign law, whose rate is chosen anew for each figure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from runtime.commands.replay.comparison import Comparison
from runtime.commands.replay.figures import LawFigures

PUBLISHED = "sign:u=0.001"
TUNED = (PUBLISHED, "sign:u=0.003", "sign:u=0.01")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim about the best law and whether it holds on one trace.

    ours, theirs: the compared figures; None means never. times: theirs over ours. at_least: theirs is never, and counts
    as the length of the trace. reached: whether `times` is at least the factor of the claim.
    """

    claim: str
    trace: str
    ours: float | None
    theirs: float | None
    times: float
    at_least: bool
    reached: bool


def verdicts(comparison: Comparison, best: str) -> list[Verdict]:
    """Check every claim about the law `best` on this trace."""
    # The factors, 20 and 4, are the goals that docs/results/balance.md reports on.
    first, last = comparison.steps
    shift = comparison.shift_step or last + 1
    balanced, recovered = attrgetter("balanced_after"), attrgetter("recovered_after")
    found = [
        _sooner("balanced sooner than sign at u = 0.001", comparison, best, [PUBLISHED], balanced, 20, shift - first),
        _sooner("balanced sooner than sign tuned for it", comparison, best, TUNED, balanced, 4, shift - first),
    ]
    if comparison.shift_step is not None:
        claim = "recovers from the shift sooner than sign tuned for it"
        found.append(_sooner(claim, comparison, best, TUNED, recovered, 4, last + 1 - shift))
    return [
        *found,
        _no_more("steady MaxVio_batch against sign tuned for it", comparison, best, lambda f: f.max_vio_batch),
        _no_more("steady MaxVio_global against sign tuned for it", comparison, best, lambda f: f.max_vio_global),
    ]


def _sooner(
    claim: str,
    comparison: Comparison,
    best: str,
    others: Sequence[str],
    figure: Callable[[LawFigures], int | None],
    goal: float,
    num_steps: int,
) -> Verdict:
    ours = figure(comparison.laws[best].figures)
    known = [value for each in others if (value := figure(comparison.laws[each].figures)) is not None]
    theirs = min(known, default=None)
    # The first update serves the second step: no law is sooner than 1.
    times = 0.0 if ours is None else max(theirs if theirs is not None else num_steps, 1) / max(ours, 1)
    return Verdict(
        claim=f"{claim}, {goal:g} times",
        trace=comparison.name,
        ours=ours,
        theirs=theirs,
        times=times,
        at_least=theirs is None,
        reached=times >= goal,
    )


def _no_more(claim: str, comparison: Comparison, best: str, figure: Callable[[LawFigures], float]) -> Verdict:
    ours = figure(comparison.laws[best].figures)
    theirs = min(figure(comparison.laws[each].figures) for each in TUNED)
    times = theirs / ours if ours else math.inf
    return Verdict(
        claim=f"{claim}, no more",
        trace=comparison.name,
        ours=ours,
        theirs=theirs,
        times=times,
        at_least=False,
        reached=times >= 1,
    )
