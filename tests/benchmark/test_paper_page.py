"""bench/paper.py: its page comes from its records, and its verdicts from their figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from beyond_runs import DMAX, TRAINED
from beyond_verdict import RIGHT, Found
from beyond_verdict import verdict as verdict_of
from in_short import BENCH, STUDIES, in_short
from noise_findings import counted
from noise_points import Points
from paper_claims import CLAIMS, worst
from paper_page import page
from paper_points import Record, Results
from shares import Share, better, difference

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


def test_the_short_version_follows_the_records(tmp_path: Path) -> None:
    assert in_short(tmp_path, tmp_path) == []
    training = json.loads((DOCS / "training.json").read_text(encoding="utf-8"))
    for point in training["points"]:
        if point["label"].startswith("masks only, SPD") and point["value"] == 0.5:
            point["correct"] = 200
    (tmp_path / "training.json").write_text(json.dumps(training))
    [told] = in_short(tmp_path, tmp_path)
    assert "masks only 600/600 (100.0 %) at TPF 6.72: -5.5 points (-7.6 to -3.8)" in told
    assert len(in_short(DOCS)) == 5


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


def test_the_headlines_of_the_short_version_are_what_the_records_say(
    records: list[Record],
) -> None:
    def read(path: Path) -> Record:
        return dict(json.loads(path.read_text(encoding="utf-8")))

    tiny = Results(read(BENCH / "tiny.json"), {}, {})
    base, masks = (tiny.at(f"{name}, threshold", 0.95) for name in ("base", "masks only"))
    dmax = tiny.at("DMax, SPD", 0.3)
    assert better(masks, base) == "within noise"
    assert masks.tpf - base.tpf > (dmax.tpf - base.tpf) / 2, "most of the speed"
    trained = Results(*records)
    pushed = trained.pooled("sampled rollouts", "SPD", 0.0)
    assert better(pushed, trained.pooled("masks only", "SPD", 0.5)) == "holds"
    early = list(Points(read(DOCS / "noise.json"), []).comparisons("random"))
    won, lost = counted(early)
    assert won > lost
    assert all(each.verdict == "holds" for each in early if (each.rate, each.steps) == (8e-6, 1200))
    for study in STUDIES:
        path = DOCS / f"{study}.json"
        if path.exists():
            won, _ = counted(Points(read(path), []).comparisons("random"))
            assert won == 0
    beyond = Found(read(DOCS / "beyond.json"))
    cforce = next(run for run in TRAINED if run.name == "cforce")
    assert (beyond.tpf(DMAX, "mbd") or 0) > (beyond.tpf(DMAX, "spd") or 0)
    assert {verdict_of(beyond, cforce, decoding) for decoding in ("spd", "mbd")} == {RIGHT}


def test_an_interval_is_newcombes() -> None:
    """His own example, 56 of 70 against 48 of 80 (Statistics in Medicine 17, 1998, method 10)."""
    delta, low, high = difference(Share(56, 70, 1), Share(48, 80, 1))
    assert delta == pytest.approx(20)
    assert (low, high) == pytest.approx((5.24, 33.39), abs=0.005)


@pytest.mark.parametrize(
    ("correct", "verdict"), [(70, "holds"), (52, "within noise"), (30, "fails")]
)
def test_better_means_beyond_chance(correct: int, verdict: str) -> None:
    assert better(Share(correct, 100, 1), Share(50, 100, 1)) == verdict


def test_a_claim_is_as_good_as_its_weakest_part() -> None:
    assert worst("holds", "holds") == "holds"
    assert worst("holds", "within noise") == "within noise"
    assert worst("fails", "holds", "within noise") == "fails"


@pytest.mark.parametrize(
    ("brief", "label", "value", "correct"),
    [
        ("the base model collapses when pushed", "base, threshold", 0.0, 500),
        ("so does SPD on the base model", "base, SPD", 0.5, 500),
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
