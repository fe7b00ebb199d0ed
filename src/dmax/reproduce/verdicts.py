"""Measured figures beside published ones, and whether they agree.

A published value agrees if it lies within the 95 % interval of the measured one, widened by half of
the last digit that was printed. The interval of an accuracy is Wilson's, that of tokens per forward
a bootstrap over the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmax.evaluation.statistics import wilson_interval
from dmax.outputs import ratio

INSIDE = "inside"
BELOW = "ours is below"
ABOVE = "ours is above"
NOT_PUBLISHED = "nothing to compare"

NUM_RESAMPLES = 2000
ACCURACY_DIGIT = 0.05  # half of the last printed digit, in points
TPF_DIGIT = 0.005


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measured figure and the published one.

    Attributes:
        value: measured; an accuracy is in percent.
        interval: its 95 % interval.
        published: None if nothing was.
        verdict: `INSIDE`, `BELOW`, `ABOVE` or `NOT_PUBLISHED`.
    """

    value: float
    interval: tuple[float, float]
    published: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Score:
    """Answers that are right under one scoring, and what that says of the published accuracy."""

    correct: int
    total: int
    accuracy: Comparison


def compare(
    value: float, interval: tuple[float, float], published: float | None, digit: float
) -> Comparison:
    """Whether a published value lies within an interval, give or take half of its last digit."""
    low, high = interval
    if published is None:
        verdict = NOT_PUBLISHED
    elif published > high + digit:
        verdict = BELOW
    elif published < low - digit:
        verdict = ABOVE
    else:
        verdict = INSIDE
    return Comparison(value, interval, published, verdict)


def score(is_correct: Sequence[bool], published: float | None) -> Score:
    """The score of answers, beside a published accuracy in percent."""
    correct = sum(is_correct)
    total = len(is_correct)
    low, high = wilson_interval(correct, total)
    accuracy = compare(
        100 * ratio(correct, total), (100 * low, 100 * high), published, ACCURACY_DIGIT
    )
    return Score(correct, total, accuracy)


def compare_tpf(ratios: Sequence[float], published: float | None) -> Comparison:
    """The mean of tokens per forward of all examples, beside a published one."""
    mean = ratio(sum(ratios), len(ratios))
    return compare(mean, bootstrap_interval(ratios), published, TPF_DIGIT)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: percentiles over `NUM_RESAMPLES` resamples of a fixed seed."""
    if not values:
        return 0.0, float("inf")
    generator = np.random.default_rng(0)
    drawn = generator.choice(np.asarray(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
