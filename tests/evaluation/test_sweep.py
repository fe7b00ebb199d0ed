"""Sweeps: what is measured, what is not measured again, and what is drawn from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_llm import folder_fixture, llm_fixture  # noqa: F401  (fixtures)

from dmax import LLM, InputError, strategies
from dmax.decoding import get_strategy
from dmax.evaluation.plots import draw, page
from dmax.evaluation.statistics import aup_table, pareto
from dmax.evaluation.sweep import Curve, check_folder, curves_of, parse_grid, run_sweep
from dmax.tasks import Example

pytest.importorskip("matplotlib")


class Echo:
    """A task that a random model gets right by chance alone."""

    name = "echo"
    max_new_tokens = 8

    def examples(self, limit: int, seed: int) -> list[Example]:
        return [Example(f"Tom has {index + seed} apples.", "1") for index in range(limit)]

    def extract(self, text: str) -> str | None:
        return text[:1] or None

    def score(self, text: str, example: Example) -> bool:
        return len(text) % 2 == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1:0.25", (0, 0.25, 0.5, 0.75, 1)),
        ("0:1:0.1", tuple(n / 10 for n in range(11))),
        ("0.3,0.9", (0.3, 0.9)),
        ("1", (1,)),
    ],
)
def test_grids(text: str, expected: tuple[float, ...]) -> None:
    assert parse_grid(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "0:1", "0:1:0", "1:0:0.1", "0:1:-0.1", "0:1:0.00001", "0:inf:1"]
)
def test_bad_grids_are_one_clear_error(text: str) -> None:
    with pytest.raises(InputError, match="cannot read the grid"):
        parse_grid(text)


def test_every_method_can_be_swept(heads: Path) -> None:
    curves = curves_of(
        [str(heads)], strategies(), (0.0, 1.0)
    )  # a model's folder, so far as strategies look there
    assert [curve.strategy for curve in curves] == list(strategies())
    for curve in curves:
        made = [get_strategy(curve.params(value, 8)) for value in curve.values]
        assert len(set(map(repr, made))) == len(curve.values)  # the knob turns something
    with pytest.raises(InputError, match="strategy `learn2pd` has no head `some/model`"):
        curves_of(["some/model"], ["learn2pd"], (0.5,))
    with pytest.raises(InputError, match="unknown strategy"):
        curves_of(["m"], ["spdd"], (0.5,))
    with pytest.raises(InputError, match="`threshold` must be"):
        curves_of(["m"], ["spd"], (1.5,))


def test_models_of_one_name_are_told_apart_and_each_is_measured_once() -> None:
    curves = curves_of(["a/final", "b/final", "tiny", "a/final"], ["spd", "spd"], (0.5,))
    assert [curve.label for curve in curves] == ["a/final, spd", "b/final, spd", "tiny, spd"]
    assert [curve.label for curve in curves_of(["runs/tiny"], ["spd"], (0.5,))] == ["tiny, spd"]


@pytest.fixture
def opened(llm: LLM) -> Any:
    """`LLM` by name, which counts how often it was asked."""

    def open_model(name: str) -> LLM:
        open_model.names.append(name)  # type: ignore[attr-defined]
        return llm

    open_model.names = []  # type: ignore[attr-defined]
    return open_model


CURVES = (Curve("one", "a", "spd", (0.0, 0.9)), Curve("two", "b", "threshold", (0.5,)))


def test_an_interrupted_sweep_goes_on_where_it_stopped(opened: Any, tmp_path: Path) -> None:
    output, told = tmp_path / "deep" / "sweep.json", list[str]()
    options: dict[str, Any] = {"limit": 3, "seed": 1, "open_model": opened}
    whole = run_sweep(CURVES, Echo(), tmp_path / "whole.json", **options)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(CURVES, Echo(), output, **options, report=stop)
    assert len(json.loads(output.read_text())["points"]) == 1
    resumed = run_sweep(CURVES, Echo(), output, **options, report=told.append)
    assert len(told) == 2

    def timeless(record: dict[str, Any]) -> list[dict[str, Any]]:
        points = json.loads(json.dumps(record["points"]))  # tuples become lists, as in the file
        return [{k: v for k, v in point.items() if k != "tokens_per_second"} for point in points]

    assert timeless(resumed) == timeless(whole)
    assert [(p["label"], p["value"]) for p in whole["points"]] == [
        ("one", 0.0),
        ("one", 0.9),
        ("two", 0.5),
    ]
    assert all(p["total"] == 3 and p["tpf"] > 0 for p in whole["points"])


def test_other_weights_are_measured_anew_and_other_questions_refused(
    llm: LLM, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "sweep.json"
    run_sweep(CURVES[1:], Echo(), output, limit=2, seed=1, open_model=opened)
    with pytest.raises(InputError, match="holds a sweep of"):
        run_sweep(CURVES[1:], Echo(), output, limit=3, seed=1, open_model=opened)
    with pytest.raises(InputError, match=r"'max_new_tokens': 8}, not of .*'max_new_tokens': 16}"):
        run_sweep(CURVES[1:], Echo(), output, limit=2, seed=1, max_new_tokens=16, open_model=opened)
    weight = llm.model.get_input_embeddings().weight
    changed, told = weight.detach().clone(), list[str]()
    changed[0] += 1
    monkeypatch.setattr(weight, "data", changed)
    record = run_sweep(
        CURVES[1:], Echo(), output, limit=2, seed=1, open_model=opened, report=told.append
    )
    assert len(told) == len(record["points"]) == 1


@pytest.mark.parametrize("name", ["plot.svg", "plot.png", "report.html"])
def test_a_page_of_something_else_is_not_replaced(tmp_path: Path, name: str) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} exists and no sweep wrote it"):
        check_folder(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")  # which `run_sweep` looks into
    check_folder(tmp_path)


@pytest.mark.parametrize(
    "content", ["no json", "[]", "{}", '{"task": "echo", "limit": 2, "seed": 1}']
)
def test_a_file_of_something_else_is_refused(content: str, opened: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match="not the record of a sweep"):
        run_sweep(CURVES, Echo(), tmp_path / "x.json", limit=2, seed=1, open_model=opened)
    assert (tmp_path / "x.json").read_text() == content


def point(label: str, tpf: float, accuracy: float) -> dict[str, Any]:
    return {
        **{
            "label": label,
            "knob": "threshold",
            "value": 0.5,
            "correct": round(accuracy * 200),
            "total": 200,
        },
        **{
            "accuracy": accuracy,
            "interval": [accuracy - 0.02, min(accuracy + 0.02, 1.0)],
            "tpf": tpf,
        },
        **{"tpf_paper": tpf, "tokens_per_second": 10.0},
    }


RECORD = {
    "task": "echo <i>",
    "limit": 1000,  # more than the task has
    "seed": 7,
    "environment": {"cpu": "a & b"},
    "points": [
        point("base", 2.0, 0.92),
        point("base", 4.0, 0.5),
        point("new", 2.0, 0.91),
        point("new", 5.0, 0.92),
    ],
}


def test_the_front_holds_what_nothing_beats() -> None:
    points = [
        point("a", 1, 0.9),
        point("a", 2, 0.8),
        point("b", 2, 0.85),
        point("b", 1.5, 0.7),
        point("c", 3, 0.2),
    ]
    assert [(p["tpf"], p["accuracy"]) for p in pareto(points)] == [(1, 0.9), (2, 0.85), (3, 0.2)]
    assert pareto([]) == []


def test_aup_of_every_curve() -> None:
    base, new = aup_table(RECORD)
    assert (base["label"], new["label"]) == ("base", "new")
    assert (
        base["aup"] == base["aup_paper"] == pytest.approx(2 * 92)
    )  # its second point is below both floors
    assert new["aup"] > base["aup"]
    assert aup_table({"points": []}) == []


def test_plots_are_pictures_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "c.png"):
        draw(RECORD, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = {
        element.text for element in ElementTree.parse(tmp_path / "a.svg").iter() if element.text
    }
    assert {"base", "new", "tokens per forward (TPF)", "correct answers, % of 200"} <= texts
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="nothing was measured"):
        draw({**RECORD, "points": []}, tmp_path / "d.svg")


def test_the_page_is_whole_and_escapes_what_it_shows() -> None:
    text = page(RECORD, "a < b")
    assert "<title>a &lt; b</title>" in text and "echo &lt;i&gt;" in text and "a &amp; b" in text
    assert text.count("<svg") == 1 and "http-equiv" not in text and "<script" not in text
    assert "90.0 % to 94.0 %" in text and "184" in text and "200 examples" in text


def test_accuracy_may_be_drawn_over_what_a_position_yields(tmp_path: Path) -> None:
    points = [
        p | {"generated_tokens": 100, "num_positions": 400 * (1 + i)}
        for i, p in enumerate(RECORD["points"])
    ]
    many = [
        p | {"label": f"{p['label']} {i}"} for p in points for i in range(6)
    ]  # the legend moves beside the plot
    draw({**RECORD, "points": many}, tmp_path / "a.svg", x="tokens_per_position")
    texts = {
        element.text for element in ElementTree.parse(tmp_path / "a.svg").iter() if element.text
    }
    assert {"tokens per computed position", "base 5", "new 0"} <= texts
    assert [
        p["tokens_per_position"]
        for p in pareto([{**points[0], "tokens_per_position": 0.25}], "tokens_per_position")
    ] == [0.25]
