"""The interval: known values, its defining equation, and its edges."""

from __future__ import annotations

import math

import pytest

from dmax.evaluation.statistics import wilson_interval

COUNTS = [(0, 1), (1, 1), (1, 2), (0, 50), (50, 50), (3, 7), (187, 200), (999, 1000)]


def test_known_values() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), COUNTS)
def test_its_ends_are_the_shares_just_compatible_with_the_count(correct: int, total: int) -> None:
    share = correct / total
    for end in wilson_interval(correct, total):  # |share - end| = z * standard error at `end`
        assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / total), abs=1e-7)


@pytest.mark.parametrize(("correct", "total"), COUNTS)
def test_it_holds_the_share_and_stays_a_share(correct: int, total: int) -> None:
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1
    assert low < high


@pytest.mark.parametrize(("correct", "total"), COUNTS)
def test_failures_mirror_successes_and_more_examples_narrow_it(correct: int, total: int) -> None:
    low, high = wilson_interval(correct, total)
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low))
    lower, higher = wilson_interval(4 * correct, 4 * total)
    assert higher - lower < high - low


def test_nothing_counted_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
