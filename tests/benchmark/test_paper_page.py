"""bench/paper.py: its page comes from its records, and its verdicts from their figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from in_short import in_short
from paper_claims import CLAIMS, worst
from paper_page import page
from paper_points import Record, Results
from shares import Share, collapses, difference
from shares import verdict as compared

DOCS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def records() -> list[Record]:
    names = ("decoding", "training", "measures")
    return [json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in names]


def verdict(records: list[Record], brief: str) -> str:
    [claim] = [claim for claim in CLAIMS if claim.brief == brief]
    return claim.judge(Results(*records))[0]


def test_the_page_is_what_the_records_give(records: list[Record]) -> None:
    shown = page(Results(*records), in_short(DOCS))
    assert shown == (DOCS / "README.md").read_text(encoding="utf-8")


def test_the_page_says_what_was_measured_on_another_day(records: list[Record]) -> None:
    training = copy.deepcopy(records[1])
    for point in training["points"]:
        point.pop("environment", None)
    one_day = page(Results(records[0], training, records[2]), [])
    assert "Measured on another day" not in one_day
    earlier = training["environment"] | {"date": "2026-01-31T00:00:00+00:00"}
    for point in training["points"]:
        if point["label"].startswith(("mask ratio 1, ", "masks only, ")):
            point["environment"] = earlier
    several = page(Results(records[0], training, records[2]), [])
    said = "Measured on another day: mask ratio 1 on 2026-01-31, masks only on 2026-01-31."
    assert said in several


def test_an_interval_is_newcombes() -> None:
    """His own example, 56 of 70 against 48 of 80 (Statistics in Medicine 17, 1998, method 10)."""
    delta, low, high = difference(Share(56, 70, 1), Share(48, 80, 1))
    assert delta == pytest.approx(20)
    assert (low, high) == pytest.approx((5.24, 33.39), abs=0.005)


@pytest.mark.parametrize(
    ("correct", "verdict"), [(70, "holds"), (52, "within noise"), (30, "fails")]
)
def test_more_accurate_means_beyond_chance(correct: int, verdict: str) -> None:
    assert compared(Share(correct, 100, 1), Share(50, 100, 1)) == verdict


def test_a_model_collapses_if_less_than_half_is_left() -> None:
    assert collapses(Share(39, 100, 1), Share(160, 200, 1))
    assert not collapses(Share(40, 100, 1), Share(160, 200, 1))


def test_a_claim_is_as_good_as_its_weakest_part() -> None:
    assert worst("holds", "holds") == "holds"
    assert worst("holds", "within noise") == "within noise"
    assert worst("fails", "holds", "within noise") == "fails"


@pytest.mark.parametrize(
    ("brief", "label", "value", "correct"),
    [
        ("the base model collapses when pushed", "base, threshold", 0.0, 500),
        ("so does SPD on the base model", "base, SPD", 0.5, 500),
        ("so does SPD on the base model", "base, SPD", 0.5, 300),  # less than DMax, and no collapse
        ("DMax beats the base at equal TPF", "DMax, SPD", 0.5, 20),
        ("soft and hard inputs are alike at mild thresholds", "DMax, hard tokens", 0.5, 20),
    ],
)
def test_a_claim_that_holds_fails_with_other_figures(
    records: list[Record], brief: str, label: str, value: float, correct: int
) -> None:
    assert verdict(records, brief) == "holds"
    others = copy.deepcopy(records)
    [point] = [p for p in others[0]["points"] if (p["label"], p["value"]) == (label, value)]
    point["correct"] = correct
    assert verdict(others, brief) == "fails"


def test_a_retrained_model_counts_with_all_its_seeds(records: list[Record]) -> None:
    brief = "OPUT beats masks only on the same data when pushed"
    assert verdict(records, brief) == "holds"
    others = copy.deepcopy(records)
    for point in others[1]["points"]:
        if point["label"].startswith("sampled rollouts, SPD"):
            point["correct"] = 20
    assert verdict(others, brief) == "fails"


def test_a_model_that_is_never_wrong_or_decodes_nothing_proves_nothing(
    records: list[Record],
) -> None:
    for name, counts in (
        ("corrections, base", {"wrong": 0, "mended": 0}),
        ("revisions, hard tokens, random tokens", {"changes": 0, "chances": 0}),
    ):
        others = copy.deepcopy(records)
        others[2][name].update(counts)
        assert page(Results(*others), [])
        brief = "OPUT mends more than the base and breaks less than random tokens"
        if "chances" in counts:
            brief = "random tokens are worse than OPUT"
        assert verdict(others, brief) == "within noise"
