"""Scripts of bench/ end with one sentence where something cannot be done, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

OTHER = {"task": "gsm8k", "limit": 3, "seed": 7, "data": None, "max_new_tokens": 256}


@pytest.mark.parametrize(
    ("script", "name"),
    [("tiny", "tiny.json"), ("methods", "methods.json"), ("paper", "decoding.json")],
)
def test_a_record_of_another_sweep_is_named_and_kept(
    script: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    record = tmp_path / name
    text = json.dumps(OTHER | {"environment": {}, "points": []})
    record.write_text(text)
    monkeypatch.setattr("paper.check_retrained", lambda: None)
    output = str(record if script == "tiny" else tmp_path)
    said = refusal(script, "--output", output)
    assert said.startswith(f"error: {record} holds a sweep of ")
    assert "hint: choose another output" in said
    assert record.read_text() == text
    assert list(tmp_path.iterdir()) == [record]


def test_retrained_models_are_asked_for_before_hours_of_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal("paper")
    assert said.startswith("error: runs/ablation/masks-only-1 is not there yet\n")
    assert "hint: run `python bench/ablation_training.py` first" in said
    assert not list(tmp_path.iterdir())


def test_a_curve_that_does_not_exist_is_refused_with_those_that_do(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    arguments = ["--only", "DMax, SPD", "dmax", "--output", str(tmp_path / "tiny.json")]
    said = refusal("tiny", *arguments)
    assert "no curve is called 'dmax'; there are: base, threshold; " in said
    assert not list(tmp_path.iterdir())
