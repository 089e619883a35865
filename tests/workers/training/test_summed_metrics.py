"""Metrics that are sums over ranks, with the measurements of two ranks written out."""

import pytest
import torch

from dispatch.diagnosis.meter import Reading
from workers.training import summed_metrics
from workers.training.summed_metrics import RankStep, SummedMetric, metrics_from_sums, values_to_sum


def measured(routed: int, nll_sum: float, z_sum: float | None) -> RankStep:
    return RankStep(
        moved=Reading({}, routed, routed, routed, routed, 0, 0, ()),
        nll_sum=torch.tensor(nll_sum, dtype=torch.float64),
        balance_sum=None,
        z_sum=None if z_sum is None else torch.tensor(z_sum, dtype=torch.float64),
        num_targets=4,
        num_tokens=8,
    )


def summed(ranks: list[RankStep]) -> dict[str, float | None]:
    whole, others = zip(*map(values_to_sum, ranks), strict=True)
    return metrics_from_sums(ranks[0], torch.stack(whole).sum(0), torch.stack(others).sum(0))


def test_whole_numbers_are_exact_and_losses_are_means_of_the_global_batch() -> None:
    line = summed([measured(2**60 + 1, 3.0, 2.0), measured(2, 5.0, 6.0)])
    assert line["tokens_routed"] == line["tokens_returned"] == 2**60 + 3  # no float64 could tell it from 2**60
    assert isinstance(line["tokens_sent"], int)
    assert (line["loss"], line["z_loss"]) == (2.0, 1.0)


def test_a_loss_that_is_off_is_null_and_does_not_travel() -> None:
    ranks = [measured(1, 3.0, None)] * 2
    assert [len(part) for part in values_to_sum(ranks[0])] == [4, 1]
    line = summed(ranks)
    assert (line["loss"], line["aux_loss"], line["z_loss"]) == (1.5, None, None)


def test_one_line_declares_a_further_metric(monkeypatch) -> None:
    lost = SummedMetric("tokens_lost", lambda rank: rank.moved.routed - rank.moved.returned)
    monkeypatch.setattr(summed_metrics, "SUMMED_METRICS", [*summed_metrics.SUMMED_METRICS, lost])
    assert summed([measured(3, 1.0, None), measured(4, 1.0, None)])["tokens_lost"] == 0


@pytest.mark.parametrize("value", [0.5, True])
def test_a_value_of_another_type_is_refused(value: float, monkeypatch) -> None:
    late = SummedMetric("late", lambda _: value)  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(summed_metrics, "SUMMED_METRICS", [late])
    with pytest.raises(TypeError, match=r"metric 'late' is .* must be an int, a float64 tensor"):
        values_to_sum(measured(3, 1.0, None))
