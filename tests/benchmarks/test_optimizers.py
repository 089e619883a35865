"""What the comparison of optimizers makes of curves; the runs are `python -m benchmarks.optimizers`."""

import pytest

from benchmarks.optimizers import Curve, table, tokens_to

CURVE: Curve = [(100, 5.0), (200, 3.0), (300, 2.0), (400, 2.5)]


def test_tokens_to_a_loss_lie_between_two_evaluations() -> None:
    assert tokens_to(CURVE, 4.0) == pytest.approx(150)
    assert tokens_to(CURVE, 2.25) == pytest.approx(275)
    assert tokens_to(CURVE, 6.0) == 100  # there at the first one
    assert tokens_to(CURVE, 1.0) is None


def test_the_table_compares_with_the_first_and_says_who_does_not_come_there() -> None:
    million: Curve = [(1_000_000, 5.0), (2_000_000, 3.0)]
    lines = table({"a": [(million, 0.5)], "b": [([(500_000, 3.0)], 0.25)], "c": [([(900_000, 9.0)], 1.0)]}, 3.0)
    assert lines[2:] == [
        "| `a` | 2.000 M | 1.00 | 3.0000 | 0.50 |",
        "| `b` | 0.500 M | 0.25 | 3.0000 | 0.25 |",
        "| `c` | not by all seeds |  | 9.0000 | 1.00 |",
    ]
