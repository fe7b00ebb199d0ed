"""bench/oput.py at small sizes, and what its committed record says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oput
import pytest
from published_step import IGNORE

from dmax.training.objectives import Loss, oput_loss

RESULTS = Path(oput.__file__).parent / "results"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, Any]]:
    """The script with small sizes, and without processes of their own; its end and its record."""
    output = tmp_path / "oput.json"
    arguments = ["oput.py", "--quick", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(oput, "apart", lambda measure, *given: 1.0)

    def run() -> tuple[int, Any]:
        code = oput.main()
        return code, json.loads(output.read_text())

    return run


def test_the_record_holds_costs_and_equal_gradients(
    run: Callable[[], tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, record = run()
    assert code == 0
    for row in record["pairs"]:
        assert 0 < row["gradient_difference"] <= oput.TOLERANCE
        assert row["cpu_seconds"].keys() == {oput.PUBLISHED, oput.SKIPPING, oput.DMAX}
    assert [row["loss"] for row in record["logits"]] == ["plain", "chunked"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split()[0]) == pytest.approx(record["pairs"][0]["ratio"], abs=0.005)


def test_it_ends_with_1_if_the_gradients_differ(
    run: Callable[[], tuple[int, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(*arguments: Any, **options: Any) -> Loss:
        loss = oput_loss(*arguments, **options)
        return Loss(loss.total * 1.001, loss.parts, loss.per_sequence)

    monkeypatch.setattr(oput, "oput_loss", wrong)
    code, record = run()
    assert code == 1
    assert all(row["gradient_difference"] > oput.TOLERANCE for row in record["pairs"])
    assert "llama, prompt: the gradients differ" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["plain", "chunked"])
def test_the_peak_of_the_vocabulary_loss_is_measured(way: str) -> None:
    peak = oput.logits_peak(way, oput.QUICK)
    assert peak >= 0 or math.isnan(peak)


def test_noise_falls_on_what_has_a_label() -> None:
    pair = oput.make_pair("llama, prompt", oput.QUICK)
    is_masked = pair.sample.noisy_ids == pair.mask
    assert is_masked.any() and not is_masked[: oput.QUICK.prompt].any()
    assert (pair.sample.labels[: oput.QUICK.prompt] == IGNORE).all()


def test_the_committed_record_holds_what_the_docs_promise() -> None:
    """A pair costs at most 1 / 1.7 of the published one, and a logit in chunks a quarter."""
    [file] = RESULTS.glob("oput_*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["pairs"][0]["ratio"] >= 1.7
    assert all(row["gradient_difference"] <= oput.TOLERANCE for row in record["pairs"])
    plain, chunked = (row["bytes_per_logit"] for row in record["logits"])
    assert chunked < plain / 4
