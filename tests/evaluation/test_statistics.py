"""The interval: known values, its equation, its edges. AUP: the paper's figures from its curves."""

from __future__ import annotations

import math

import pytest

from dmax.evaluation.statistics import accuracy_under_parallelism, sign_test, wilson_interval

COUNTS = [(0, 1), (1, 1), (1, 2), (0, 50), (50, 50), (3, 7), (187, 200), (999, 1000)]


def test_known_values() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), COUNTS)
def test_its_ends_are_the_shares_just_compatible_with_the_count(correct: int, total: int) -> None:
    share = correct / total
    for end in wilson_interval(correct, total):  # |share - end| = z * standard error at `end`
        assert abs(share - end) == pytest.approx(
            1.96 * math.sqrt(end * (1 - end) / total), abs=1e-7
        )


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


def test_the_sign_test_is_exact() -> None:
    assert sign_test(0, 0) == sign_test(1, 1) == sign_test(3, 3) == 1.0
    assert sign_test(0, 5) == sign_test(5, 0) == pytest.approx(2 / 2**5)
    assert sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10)


# Figure 4 of the DMax paper, (TPF, accuracy): the base model, DMax, and the AUP of Table 1 for
# each. The figure prints accuracies; TPF was read off its axis to 0.03, which alone is worth up to
# 2 AUP at 70 %.
FIGURE_4 = {
    "gsm8k": (
        [(2.04, 92.6), (3.82, 88.4), (4.47, 78.0), (4.92, 53.5), (5.78, 42.1)],
        [(3.00, 93.3), (4.13, 93.5), (5.48, 92.1), (6.01, 90.4)],
        (340, 557),
    ),
    "math500": (
        [(2.58, 75.8), (3.46, 72.8), (4.14, 65.0), (4.75, 53.2), (5.89, 29.2), (6.36, 15.2)],
        [(3.45, 78.0), (4.70, 77.0), (5.23, 77.8), (5.94, 75.4), (6.59, 71.6)],
        (257, 507),
    ),
    "humaneval": (
        [(4.38, 84.2), (5.28, 64.0), (5.73, 37.2), (6.21, 10.4), (6.63, 3.7)],
        [(4.58, 87.2), (5.55, 85.4), (6.45, 88.4), (7.36, 83.5)],
        (369, 637),
    ),
    "mbpp": (
        [(2.71, 80.6), (3.53, 74.4), (4.14, 62.5), (4.66, 44.0), (5.27, 14.8), (5.98, 2.3)],
        [(3.58, 83.4), (4.22, 81.7), (4.98, 81.5), (5.86, 79.2)],
        (276, 482),
    ),
}


@pytest.mark.parametrize("task", FIGURE_4)
def test_a21_the_papers_curves_give_the_papers_aup(task: str) -> None:
    base, dmax, reported = FIGURE_4[task]
    careful = base[0][1]
    for curve, expected in zip((base, dmax), reported, strict=True):
        assert accuracy_under_parallelism(curve, best=careful, floor=careful - 10) == pytest.approx(
            expected, abs=2.5
        )


def test_a21_aup_as_d3llm_defines_it() -> None:
    points = [(4.0, 80.0), (2.0, 90.0), (3.0, 86.0)]  # 80 is below 90 - 5
    tail = (90 * math.exp(-3 * (1 - 90 / 95)) + 86 * math.exp(-3 * (1 - 86 / 95))) / 2
    assert accuracy_under_parallelism(points, best=95.0) == pytest.approx(2 * 90 + tail)
    assert accuracy_under_parallelism(points, best=95.0, floor=99.0) == 0
    assert accuracy_under_parallelism([], best=95.0) == 0
