"""Verdicts: intervals worked out by hand, and what lies within them."""

from __future__ import annotations

import pytest

from dmax.reproduce.verdicts import (
    ABOVE,
    BELOW,
    INSIDE,
    NOT_PUBLISHED,
    bootstrap_interval,
    compare,
    compare_tpf,
    score,
)


@pytest.mark.parametrize(
    ("published", "verdict"),
    [
        (93.5, INSIDE),
        (89.2, INSIDE),  # Wilson's interval of 187/200 begins at 89.2
        (89.1, ABOVE),
        (96.2, INSIDE),
        (96.3, BELOW),
        (None, NOT_PUBLISHED),
    ],
)
def test_the_verdict_on_an_accuracy(published: float | None, verdict: str) -> None:
    found = score([True] * 187 + [False] * 13, published)
    assert (found.correct, found.total, found.accuracy.value) == (187, 200, 93.5)
    # By hand: centre 0.92680, half 0.03482 at z = 1.96.
    assert found.accuracy.interval == pytest.approx((89.198, 96.162), abs=0.0005)
    assert found.accuracy.verdict == verdict


def test_a_printed_value_is_known_to_half_of_its_last_digit() -> None:
    assert compare(5.0, (4.9, 5.1), 5.104, digit=0.005).verdict == INSIDE
    assert compare(5.0, (4.9, 5.1), 5.11, digit=0.005).verdict == BELOW
    assert compare(5.0, (4.9, 5.1), 4.89, digit=0.005).verdict == ABOVE


def test_a_bootstrap_is_that_of_the_mean_and_repeats() -> None:
    values = [4.0, 6.0] * 200
    low, high = bootstrap_interval(values)
    # The mean of 400 values of standard deviation 1 has a standard error of 0.05.
    assert (low, high) == pytest.approx((5 - 1.96 * 0.05, 5 + 1.96 * 0.05), abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([3.0] * 10) == (3.0, 3.0)
    found = compare_tpf(values, 5.48)
    assert (found.value, found.verdict) == (5.0, BELOW)
    assert compare_tpf(values, 5.05).verdict == INSIDE


def test_nothing_measured_says_nothing() -> None:
    assert compare_tpf([], 5.0).verdict == INSIDE
    assert score([], 50.0).accuracy.verdict == INSIDE
