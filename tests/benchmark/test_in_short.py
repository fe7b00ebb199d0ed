"""bench/in_short.py: every sentence, and its headline, is what the records say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_short import BENCH, in_short
from noise_plan import PRETRAINED, PRETRAINED_SLOW

DOCS = Path(__file__).parents[2] / "docs" / "results"
MORE_OPUT = "After going on with OPUT instead: by SPD 8.42 ([beyond](beyond.md))."
Change = Callable[[dict[str, Any]], object]


def read(name: str) -> dict[str, Any]:
    """A committed record."""
    folder = BENCH if name in ("tiny", "controls") else DOCS
    return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def told(folder: Path, *names: str, **changed: Change) -> list[str]:
    """The sentences of these records alone, some of them changed."""
    for name in (*names, *changed):
        record = read(name)
        changed.get(name, lambda record: None)(record)
        (folder / f"{name}.json").write_text(json.dumps(record))
    return in_short(folder, folder)


def solving(prefix: str, correct: int, value: float | None = None, **figures: float) -> Change:
    """Sets how many problems are solved under labels that begin so."""

    def change(record: dict[str, Any]) -> None:
        for point in record["points"]:
            if point["label"].startswith(prefix) and value in (None, point["value"]):
                point.update(correct=correct, **figures)

    return change


def keeping(*prefixes: str) -> Change:
    """Leaves only the points under labels that begin so."""

    def change(record: dict[str, Any]) -> None:
        record["points"] = [p for p in record["points"] if p["label"].startswith(prefixes)]

    return change


def test_nothing_is_told_of_nothing(tmp_path: Path) -> None:
    assert in_short(tmp_path, tmp_path) == []
    assert len(in_short(DOCS)) == 5


@pytest.mark.parametrize(
    ("correct", "tpf", "headline"),
    [
        (448, 5.69, "Masks alone buy most of the speed at the base's accuracy."),
        (499, 2.0, "Masks alone buy a part of the speed and raise the base's accuracy."),
        (10, 1.0, "Masks alone buy none of the speed and lower the base's accuracy."),
    ],
)
def test_masks_alone(correct: int, tpf: float, headline: str, tmp_path: Path) -> None:
    [said] = told(tmp_path, tiny=solving("masks only, threshold", correct, 0.95, tpf=tpf))
    assert said.startswith(f"**{headline}**")


@pytest.mark.parametrize(
    ("correct", "pays", "figures"),
    [
        (160, "pays", "masks only 480/600 (80.0 %) at TPF 6.72: +14.5 points (+10.8 to +18.2)"),
        (189, "has not been seen to pay", "+0.0 points (-2.6 to +2.6)"),
        (200, "costs accuracy", "-5.5 points (-7.6 to -3.8)"),
    ],
)
def test_wrong_tokens(correct: int, pays: str, figures: str, tmp_path: Path) -> None:
    [said] = told(tmp_path, training=solving("masks only, SPD", correct, 0.5))
    assert said.startswith(f"**Training on wrong tokens {pays} when decoding is pushed.**")
    assert figures in said


@pytest.mark.parametrize(
    ("own", "hard", "where"),
    [
        (None, None, "matters early, at small rates, and for hard tokens"),
        (None, 1, "matters early and at small rates"),
        (0, None, "matters for hard tokens"),
        (0, 1, "has not been seen to matter"),
    ],
)
def test_own_tokens(own: int | None, hard: int | None, where: str, tmp_path: Path) -> None:
    changes: dict[str, Change] = {}
    if own is not None:
        changes["noise"] = solving("sampled", own)
    if hard is not None:
        changes["tiny"] = solving("DMax, hard feedback", hard)
    said = told(tmp_path, "noise", "controls", "tiny", **changes)[-1]
    assert said.startswith(f"**That they are the model's own {where}.**")


def test_a_lead_that_is_none_is_told_as_a_difference(tmp_path: Path) -> None:
    changed = solving("DMax, SPD", 1000, 0.0)
    said = told(tmp_path, "noise", "tiny", controls=changed)[-1]
    assert "After the whole training the difference is -" in said and "they lead" not in said


@pytest.mark.parametrize(
    ("correct", "headline"),
    [
        (None, "own tokens have not been seen to help."),
        (199, "own tokens help in some settings."),
    ],
)
def test_a_pretrained_model(correct: int | None, headline: str, tmp_path: Path) -> None:
    """The headline is that of all studies: here the second has the first one's points."""
    record = read(PRETRAINED)
    if correct is not None:
        solving("sampled", correct)(record)
    (tmp_path / f"{PRETRAINED_SLOW}.json").write_text(json.dumps(record))
    [said] = told(tmp_path, PRETRAINED, "pretrained")
    assert said.startswith(f"**On a small pretrained model {headline}**")


def test_whether_training_makes_the_pretrained_model_faster(tmp_path: Path) -> None:
    def slow(record: dict[str, Any]) -> None:
        record["points"]["DMax-SPD-0.3"]["tpf"] = 0.5

    [said] = told(tmp_path, PRETRAINED, pretrained=slow)
    assert "One of them makes the base faster: the careful base 158/200" in said
    [said] = told(tmp_path, PRETRAINED, pretrained=lambda record: record["points"].clear())
    assert said.endswith("([study](noise_pretrained.md)).")


@pytest.mark.parametrize(
    ("change", "begins", "ends"),
    [
        (
            keeping("tiny-"),
            "**After DMax: two open blocks (MBD).**",
            "any training: by SPD 8.64, by MBD 11.35 ([beyond](beyond.md)).",
        ),
        (
            solving("CForce", 0, accuracy=0.0),
            "**After DMax: two open blocks (MBD).**",
            "with CForce: by SPD it is never as accurate, by MBD it is never as accurate. "
            f"{MORE_OPUT}",
        ),
        (
            solving("CForce, MBD, seed 2", 0, accuracy=0.0),
            "**After DMax: two open blocks (MBD), then CForce by SPD.**",
            "with CForce: by SPD 10.13, by MBD it is as accurate with some seeds only. "
            f"{MORE_OPUT}",
        ),
        (
            solving("tiny-dmax, MBD", 0, accuracy=0.0),
            "**After DMax: CForce by SPD.**",
            "any training: by SPD 8.64, by MBD it is never as accurate. After minutes of training "
            f"with CForce: by SPD 10.13, by MBD 12.57. {MORE_OPUT}",
        ),
    ],
)
def test_after_dmax(change: Change, begins: str, ends: str, tmp_path: Path) -> None:
    [said] = told(tmp_path, beyond=change)
    assert said.startswith(begins) and said.endswith(ends)


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("noise", ("base",)),
        (PRETRAINED, ("base",)),
        ("beyond", ("tiny-dmax, SPD",)),
        ("training", ()),
        ("tiny", ("base",)),
        ("controls", ("DMax",)),
    ],
)
def test_what_an_interrupted_study_has_not_measured_is_left_out(
    name: str, prefixes: tuple[str, ...], tmp_path: Path
) -> None:
    others = {"noise": ("tiny", "controls"), "controls": ("tiny", "noise")}.get(name, ())
    assert len(told(tmp_path, *others, **{name: keeping(*prefixes)})) == bool(others)
