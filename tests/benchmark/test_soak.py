"""bench/serving/load.py: the slope of memory over time, and its interval."""

from __future__ import annotations

import random
import statistics

import pytest
from serving.load import slope_with_interval

from dmax.errors import InputError


@pytest.mark.parametrize("num", [20, 39, 59])
def test_the_interval_is_that_of_twenty_parts(num: int) -> None:
    """It holds the slope in about 95 % of many draws, however many samples there are."""
    draw = random.Random(0)
    held = []
    for _ in range(1000):
        samples = [(float(at), 3.0 * at + draw.gauss(0, 1)) for at in range(num)]
        _, low, high = slope_with_interval(samples)
        held.append(low < 3.0 < high)
    assert statistics.fmean(held) == pytest.approx(0.95, abs=0.03)


def test_every_sample_counts() -> None:
    samples = [(float(at), 0.0) for at in range(59)]
    assert slope_with_interval(samples)[0] == 0
    assert slope_with_interval([*samples[:-1], (58.0, 1.0)])[0] > 0


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InputError, match="needs 20 samples of memory, got 19"):
        slope_with_interval([(float(at), 0.0) for at in range(19)])
