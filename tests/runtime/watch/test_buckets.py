import math

import numpy as np
import pytest

from runtime.watch.buckets import Buckets, Spans, spans_of


def slow_span(points: list[tuple[int, list[float]]], first: int, last: int, curve: int) -> tuple[float, float, float]:
    """Least, greatest and mean value of a curve over the steps from `first` to `last`, in the most obvious way."""
    values = [row[curve] for step, row in points if first <= step <= last and not math.isnan(row[curve])]
    return (min(values), max(values), sum(values) / len(values)) if values else (math.nan,) * 3


def check(spans: Spans, points: list[tuple[int, list[float]]], num_curves: int) -> None:
    for n, (first, last) in enumerate(zip(spans.first.tolist(), spans.last.tolist(), strict=True)):
        for curve in range(num_curves):
            found = spans.low[n, curve], spans.high[n, curve], spans.mean[n, curve]
            assert found == pytest.approx(slow_span(points, first, last, curve), nan_ok=True, rel=1e-6)


def made_points(rng: np.random.Generator, num: int, gap: int) -> list[tuple[int, list[float]]]:
    steps = np.cumsum(rng.integers(1, gap + 1, num)).tolist()
    values = np.where(rng.random((num, 2)) < 0.2, np.nan, rng.normal(size=(num, 2)))
    values[rng.random(num) < 0.1] = np.nan  # of an evaluation: nothing of these curves
    return list(zip(steps, values.tolist(), strict=True))


@pytest.mark.parametrize("num", [1, 7, 100, 1000])
@pytest.mark.parametrize("gap", [1, 5])
@pytest.mark.parametrize("max_buckets", [8, 64, 4096])
def test_spans_are_those_of_the_points_that_lie_in_them(num: int, gap: int, max_buckets: int) -> None:
    rng = np.random.default_rng(num)
    points = made_points(rng, num, gap)
    buckets = Buckets(2, max_buckets=max_buckets)
    for start in range(0, num, 33):
        part = points[start : start + 33]
        rng.shuffle(part)
        buckets.add(np.array([step for step, _ in part]), np.array([row for _, row in part]))
    end = points[-1][0]
    for first, last in ((0, end), (end // 3, end // 2), (end, end), (end + 1, end + 9)):
        for num_spans in (1, 3, 50):
            spans = buckets.spans(first, last, num_spans, [0, 1])
            check(spans, points, 2)
            assert len(spans.first) <= num_spans
            inside = [step for step, row in points if first <= step <= last and not all(map(math.isnan, row))]
            covered = [any(a <= s <= b for a, b in zip(spans.first, spans.last, strict=True)) for s in inside]
            assert all(covered)


def test_memory_is_bounded_and_a_long_run_keeps_half_of_the_buckets_in_use() -> None:
    buckets = Buckets(3, max_buckets=16)
    for start in range(0, 10_000, 100):
        buckets.add(np.arange(start, start + 100), np.ones((100, 3)))
    assert buckets.width == 1024
    spans = buckets.spans(0, 10_000, 1000, [0, 1, 2])
    assert 8 <= len(spans.first) <= 16
    assert (spans.mean == 1).all()


def test_spans_of_points_are_those_of_the_points_that_lie_in_them() -> None:
    points = made_points(np.random.default_rng(1), 300, 3)
    steps, values = np.array([step for step, _ in points]), np.array([row for _, row in points])
    for first, last, num in ((0, 10**9, 7), (50, 200, 1000), (50, 200, 1), (10**6, 10**7, 5)):
        spans = spans_of(steps, values, first, last, num)
        check(spans, [(step, row) for step, row in points if first <= step <= last], 2)
        assert len(spans.first) <= num


def test_of_chosen_curves_only_spans_with_a_value_are_given() -> None:
    buckets = Buckets(2)
    buckets.add(np.array([1, 2, 3]), np.array([[1.0, math.nan], [2.0, math.nan], [3.0, 9.0]]))
    assert buckets.spans(0, 9, 9, [1]).first.tolist() == [3]
    assert buckets.spans(0, 9, 9, [1, 0]).mean.tolist()[-1] == [9.0, 3.0]


def test_a_step_beyond_all_bounds_costs_no_memory() -> None:
    buckets = Buckets(1, max_buckets=64)
    buckets.add(np.array([1, 2**53]), np.array([[1.0], [2.0]]))
    assert buckets.spans(0, 2**53, 10, [0]).high.max() == 2.0
