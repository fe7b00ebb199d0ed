"""bench/methods.py: what its page says of the methods that were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import methods
import pytest

RESULTS = Path(methods.__file__).parents[1] / "docs" / "results"


def point(label: str, value: float, correct: int, tpf: float) -> dict[str, Any]:
    counts = {"correct": correct, "total": 200, "accuracy": correct / 200}
    return {"label": label, "value": value, "tpf": tpf, **counts}


@pytest.mark.parametrize(
    ("correct", "words", "reach"),
    [
        (190, "is more accurate than without", "never as accurate."),
        (160, "is as accurate as without, within noise,", "as accurate up to TPF 2.00."),
        (90, "is less accurate than without", "as accurate up to TPF 2.70."),
    ],
)
def test_what_training_bought_is_computed(correct: int, words: str, reach: str) -> None:
    before = [
        point("D2F's window, untrained", value, right, tpf)
        for value, right, tpf in ((0.9, 160, 2.0), (0.7, 60, 3.0))
    ]
    said = methods.bought([*before, point("D2F, trained", 0.9, correct, 3.0)]).splitlines()
    assert words in said[0] and said[0].endswith(reach)
    assert f"{correct}/200" in said[0] and "1.5 times as many tokens a forward" in said[0]
    assert "not measured yet; `dmax train recipes/tiny_dparallel.yaml`" in said[1]


def test_the_page_has_every_point_and_the_control() -> None:
    record = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    text = methods.page(record, RESULTS / "training.json")
    assert text == (RESULTS / "methods.md").read_text(encoding="utf-8")
    assert text.count("\n| ") == len(record["points"]) + 1
    assert "/600" in text


def test_a_method_that_writes_nothing_has_its_row() -> None:
    record = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    nothing = {"generated_tokens": 0, "tpf": 0.0, "tokens_per_second": 0.0, "correct": 0}
    for point in record["points"]:
        if point["label"] in ("autoregressive", "D2F's window, untrained"):
            point.update(nothing)
    text = methods.page(record, RESULTS / "training.json")
    assert "| autoregressive | `autoregressive` | count 1 | 0/200" in text
    assert "| 0.00 | nothing written |" in text
    d2f = methods.bought(record["points"]).splitlines()[0]
    assert "is more accurate than without" in d2f and "times as many tokens" not in d2f


@pytest.mark.parametrize("is_begun", [False, True])
def test_elsewhere_the_page_leaves_out_the_ablation(is_begun: bool, tmp_path: Path) -> None:
    if is_begun:
        (tmp_path / "training.json").write_text(json.dumps({"points": []}))
    record = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    text = methods.page(record, tmp_path / "training.json")
    assert "Learning from masks alone" not in text
    assert ".\n\n## Every point" in text
