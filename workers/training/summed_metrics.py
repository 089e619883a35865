"""The metrics that are sums over all ranks. Each is declared here once, by its name in metrics.jsonl.

What a rank measured is summed together with its load (`workers.control`), so that a further metric is a few bytes more
in a collective that is there anyway, and no collective of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatch.diagnosis.meter import Reading


@dataclass(frozen=True, kw_only=True, eq=False)
class RankStep:
    """What one rank measured in the forwards of a step.

    moved: the counts and times of its exchanges. nll_sum: the language model's loss in nats, summed over this rank's
    targets, float64 (). balance_sum, z_sum: auxiliary losses without their factors, summed over this rank's tokens,
    mean over layers, float64 (); None where a loss is off. num_targets, num_tokens: of the global batch.
    """

    moved: Reading
    nll_sum: Tensor
    balance_sum: Tensor | None
    z_sum: Tensor | None
    num_targets: int
    num_tokens: int


@dataclass(frozen=True)
class SummedMetric:
    """A value of every rank, written to metrics.jsonl as its sum over all ranks.

    value: returns a rank's value, an int or a float64 scalar tensor; None where there is nothing to show, which must
    then be so on all ranks. per: returns what the sum is divided by; None leaves the sum as it is.
    """

    name: str
    value: Callable[[RankStep], int | Tensor | None]
    per: Callable[[RankStep], int] | None = None


# A line here is all that a metric needs to be in metrics.jsonl; docs/run-directory.md explains each.
SUMMED_METRICS = [
    SummedMetric("loss", lambda rank: rank.nll_sum, per=lambda rank: rank.num_targets),
    SummedMetric("aux_loss", lambda rank: rank.balance_sum, per=lambda rank: rank.num_tokens),
    SummedMetric("z_loss", lambda rank: rank.z_sum, per=lambda rank: rank.num_tokens),
    SummedMetric("tokens_routed", lambda rank: rank.moved.routed),
    SummedMetric("tokens_sent", lambda rank: rank.moved.sent),
    SummedMetric("tokens_received", lambda rank: rank.moved.received),
    SummedMetric("tokens_returned", lambda rank: rank.moved.returned),
]


def values_to_sum(rank: RankStep) -> tuple[Tensor, Tensor]:
    """This rank's integers, int64, and its other values, float64, both on the CPU. Waits for the device once.

    Two vectors, since float64 holds integers up to 2^53 only.
    """
    ints, floats = _by_dtype(rank)
    stacked = torch.stack([value.to(rank.nll_sum.device) for value in floats.values()]).cpu()
    return torch.tensor(list(ints.values()), dtype=torch.int64), stacked


def metrics_from_sums(rank: RankStep, ints: Tensor, floats: Tensor) -> dict[str, float | None]:
    """The metrics by name, from the sums over all ranks of what `values_to_sum` returned for the same `rank`."""
    names = [name for values in _by_dtype(rank) for name in values]
    sums = dict(zip(names, [*ints.tolist(), *floats.tolist()], strict=True))
    shares = {each.name: sums[each.name] / each.per(rank) for each in SUMMED_METRICS if each.per and each.name in sums}
    return {each.name: None for each in SUMMED_METRICS} | sums | shares


def _by_dtype(rank: RankStep) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The integers of this rank and its other values, by name, without metrics that have nothing to show."""
    ints: dict[str, int] = {}
    floats: dict[str, Tensor] = {}
    for each in SUMMED_METRICS:
        value = each.value(rank)
        if type(value) is int:  # a bool is none
            ints[each.name] = value
        elif isinstance(value, Tensor):
            floats[each.name] = value
        elif value is not None:
            raise TypeError(f"metric {each.name!r} is {value!r:.60}; it must be an int, a float64 tensor () or None")
    return ints, floats
