"""Sweeps: what is measured, what is not measured again, and what is drawn from it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from test_llm import folder_fixture, llm_fixture  # noqa: F401  (fixtures)

from dmax import LLM, InputError, strategies
from dmax.benchmark.run import machines
from dmax.decoding import get_strategy
from dmax.evaluation.labels import along, place_labels
from dmax.evaluation.plots import draw, looks
from dmax.evaluation.report import page
from dmax.evaluation.statistics import (
    aup_table,
    careful_base,
    furthest_at_best,
    our_curve,
)
from dmax.evaluation.sweep import (
    Curve,
    check_folder,
    curves_of,
    is_of,
    parse_grid,
    run_sweep,
)
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


def test_points_measured_elsewhere_say_so(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"limit": 2, "seed": 1, "open_model": opened}
    output = tmp_path / "sweep.json"
    begun = run_sweep(CURVES[:1], Echo(), output, **options)
    elsewhere = begun["environment"] | {"cpu": "another"}
    monkeypatch.setattr("dmax.evaluation.sweep.environment", lambda device=None: elsewhere)
    record = run_sweep(CURVES, Echo(), output, **options)
    assert record["environment"] == begun["environment"]
    assert [point.get("environment") for point in record["points"]] == [None, None, elsewhere]
    machine = machines(record).partition("; ")
    assert machine[0].startswith(begun["environment"]["cpu"])
    assert machine[2].startswith("1 of 3 points: another, threads: ")
    assert "Of 2 of the 3 points." in page(record, "title")
    assert "Of all points." in page(begun, "title")


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


@pytest.mark.parametrize(
    "now",
    [
        Curve("one", "a", "spd", (0.5,), (("top_k", 4),)),
        Curve("one", "a", "spd", (0.5,), (("block_length", 2),)),
        Curve("one", "a", "spd", (0.5,), (("soft_inputs", False),)),
        Curve("one", "a", "threshold", (0.5,)),
        Curve("one", "a", "llada", (4,)),  # whose value is no threshold
    ],
    ids=["top_k", "block_length", "option", "strategy", "knob"],
)
def test_other_settings_under_a_label_are_measured_anew(
    now: Curve, opened: Any, tmp_path: Path
) -> None:
    told, output = list[str](), tmp_path / "sweep.json"
    options: dict[str, Any] = {"limit": 2, "seed": 1, "open_model": opened, "report": told.append}
    before = Curve("one", "a", "spd", (0.5, 0.9))
    for curve, num_measured in ((before, 2), (now, 1), (now, 0)):
        told.clear()
        record = run_sweep([curve], Echo(), output, **options)
        assert len(told) == num_measured
    assert [(p["strategy"], p["value"]) for p in record["points"]] == [
        (now.strategy, now.values[0])
    ]


def test_curves_of_one_label_do_not_drop_each_others_points(opened: Any, tmp_path: Path) -> None:
    told = list[str]()
    curves = [Curve("base", "a", "threshold", (0.9,)), Curve("base", "a", "spd", (0.5, 0.9))]
    for num_measured in (3, 0):
        told.clear()
        record = run_sweep(
            curves,
            Echo(),
            tmp_path / "sweep.json",
            limit=2,
            seed=1,
            open_model=opened,
            report=told.append,
        )
        assert len(told) == num_measured
        assert len(record["points"]) == 3


def test_a_value_that_is_given_twice_is_measured_once(opened: Any, tmp_path: Path) -> None:
    seen = []
    record = run_sweep(
        [Curve("one", "a", "spd", (0.5, 0.5))],
        Echo(),
        tmp_path / "sweep.json",
        limit=2,
        seed=1,
        open_model=opened,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(record["points"]) == 1
    assert seen == [(0, 1), (1, 1)]


def test_points_of_earlier_releases_are_kept() -> None:
    curve = Curve("one", "a", "spd", (0.5,), (("soft_inputs", False),))
    params = curve.params(0.5, 8)
    held = asdict(params)
    point = {"label": "one", "strategy": "spd", "value": 0.5}
    assert is_of(curve, point)  # of a release that wrote no parameters
    del held["stop"], held["deadline"]  # which came later
    assert is_of(curve, point | {"params": held})
    as_field = held | {"options": [], "soft_inputs": False, "gone": 3}
    assert is_of(curve, point | {"params": as_field})
    assert not is_of(curve, point | {"params": as_field | {"soft_inputs": True}})
    assert not is_of(curve, point | {"params": held | {"options": 3}})


@pytest.mark.parametrize("name", ["plot.svg", "plot.png", "report.html"])
def test_a_page_of_something_else_is_not_replaced(tmp_path: Path, name: str) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} exists and no sweep wrote it"):
        check_folder(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")  # which `run_sweep` looks into
    check_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"task": "echo", "limit": 2, "seed": 1}',
        '{"task": "echo", "limit": 2, "seed": 1, "points": [{"label": "a"}]}',
        '{"task": "echo", "limit": 2, "seed": 1, "points": [3]}',
    ],
)
def test_a_file_of_something_else_is_refused(content: str, opened: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match="not the record of a sweep"):
        run_sweep(CURVES, Echo(), tmp_path / "x.json", limit=2, seed=1, open_model=opened)
    assert (tmp_path / "x.json").read_text() == content


@pytest.mark.parametrize(
    "change",
    [
        {"interval": None},
        {"interval": [0.5]},
        {"interval": [0.5, math.nan]},
        {"tpf": math.nan},
        {"correct": 10**400},
        {"label": 5},
        {"environment": 5},
    ],
    ids=str,
)
def test_a_point_that_nobody_measured_is_refused(
    change: dict[str, Any], opened: Any, tmp_path: Path
) -> None:
    output = tmp_path / "sweep.json"
    run_sweep(CURVES, Echo(), output, limit=2, seed=1, open_model=opened)
    record = json.loads(output.read_text())
    record["points"][0] |= change
    output.write_text(json.dumps(record))
    with pytest.raises(InputError, match="not the record of a sweep"):
        run_sweep(CURVES, Echo(), output, limit=2, seed=1, open_model=opened)
    assert json.loads(output.read_text())["points"][1:] == record["points"][1:]


def point(label: str, tpf: float, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "label": label,
        "model": label,
        "made_for": None,
        "strategy": "threshold",
        "knob": "threshold",
        "value": 0.5,
        "correct": round(accuracy * 200),
        "total": 200,
        "accuracy": accuracy,
        "interval": [max(accuracy - 0.02, 0.0), min(accuracy + 0.02, 1.0)],
        "tpf": tpf,
        "tpf_paper": tpf,
        "tokens_per_second": 10.0,
        "batch_size": 32,
        **more,
    }


NEW: dict[str, Any] = {"made_for": "spd", "strategy": "spd"}
RECORD: dict[str, Any] = {
    "task": "echo <i>",
    "limit": 1000,  # more than the task has
    "seed": 7,
    "environment": {"cpu": "a & b"},
    "points": [
        point("new", 2.0, 0.91, **NEW),
        point("new", 5.0, 0.92, **NEW),
        point("base", 2.0, 0.92, value=0.95),
        point("base", 4.0, 0.5),
    ],
}


def test_aup_of_every_curve() -> None:
    new, base = aup_table(RECORD)
    assert (new["label"], base["label"]) == ("new", "base")
    # The second point of the base is below both floors.
    assert base["aup"] == base["aup_paper"] == pytest.approx(2 * 92)
    assert new["aup"] > base["aup"]
    assert aup_table({"points": []}) == []


def test_aup_of_the_paper_starts_from_the_base_decoded_carefully() -> None:
    found = careful_base(RECORD["points"])
    assert found is not None and (found["label"], found["value"]) == ("base", 0.95)
    # The order of the curves, and a DMax model decoded by threshold, have no say.
    dmax_by_threshold = point("new, threshold", 2.0, 0.99, value=1.0, made_for="spd")
    assert careful_base([dmax_by_threshold, *RECORD["points"]]) == found


@pytest.mark.parametrize(
    "points",
    [
        RECORD["points"][:2],  # no base model
        RECORD["points"][:2] + [point("base", 4.0, 0.5)],  # one, but not decoded carefully
        RECORD["points"] + [point("other", 2.0, 0.7, value=0.95)],  # which of the two?
        [{k: v for k, v in p.items() if k != "made_for"} for p in RECORD["points"]],  # an old file
        RECORD["points"][:2] + [point("base", 2.0, 0.0, value=0.95), point("base", 4.0, 0.5)],
    ],
)
def test_without_a_careful_base_there_is_no_aup_of_the_paper(points: list[dict[str, Any]]) -> None:
    assert careful_base(points) is None
    assert all(row["aup_paper"] is None and row["aup"] > 0 for row in aup_table({"points": points}))
    text = page({**RECORD, "points": points}, "title")
    assert "There is none as in the paper" in text and "none</td>" in text


def test_dmax_is_the_best_curve_decoded_by_spd() -> None:
    worse = point("base, spd", 1.0, 0.2, strategy="spd")
    assert our_curve([worse, *RECORD["points"]]) == "new"
    assert our_curve(RECORD["points"][2:]) is None


def test_accuracy_is_kept_as_far_as_the_interval_of_the_best_reaches() -> None:
    curve = [point("a", 1, 0.9), point("a", 2, 0.89), point("a", 3, 0.5)]
    assert furthest_at_best(curve)["tpf"] == 2


def test_plots_are_pictures_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "c.png"):
        draw(RECORD, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = {
        element.text for element in ElementTree.parse(tmp_path / "a.svg").iter() if element.text
    }
    assert {"base", "new", "tokens per forward (TPF)", "correct answers, % of 200"} <= texts
    assert "new: 92 % correct up to 5 tokens per forward" in texts  # the title says what is seen
    assert "base: 92 % correct up to 2 tokens per forward" in texts
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="nothing was measured"):
        draw({**RECORD, "points": []}, tmp_path / "d.svg")


def test_our_curve_stands_out_and_no_line_looks_like_another() -> None:
    labels = [f"method {number}" for number in range(25)]
    found = looks(labels, "method 7")
    ours = found.pop("method 7")
    assert ours.dashes == () and ours.colour not in {look.colour for look in found.values()}
    assert ours.width > 2 * max(look.width for look in found.values())
    assert len({look.dashes for look in found.values()}) == 24
    assert all(look.dashes for look in found.values())

    def lightness(colour: str) -> float:
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255

    others = [lightness(look.colour) for look in found.values()]
    assert lightness(ours.colour) < min(others) - 0.25  # in greyscale too


def test_labels_of_twenty_curves_do_not_overlap() -> None:
    generator = np.random.default_rng(0)
    anchors = 300 + 60 * generator.standard_normal((20, 2))  # a crowd
    sizes = np.stack((generator.uniform(40, 150, 20), np.full(20, 12.0)), axis=1)
    lowest, highest = np.array((0.0, 0.0)), np.array((900.0, 600.0))
    corners = place_labels(anchors, sizes, along([anchors], 6.0), lowest, highest)
    assert (corners >= lowest).all() and (corners + sizes <= highest).all()
    for one in range(20):
        for other in range(one):
            apart = (corners[one] >= corners[other] + sizes[other]) | (
                corners[other] >= corners[one] + sizes[one]
            )
            assert apart.any(), (one, other)


class Parsed(HTMLParser):
    """What a page links to, and its tables as rows of texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.values: list[str] = []
        self.captions = 0
        self.is_in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            value or "" for name, value in attrs if name in {"href", "src"} and tag != "use"
        ]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"td", "th"}:
            self.tables[-1][-1].append("")
            self.is_in_cell = True
        self.captions += tag == "caption"
        self.values += [value or "" for name, value in attrs if name == "data-value"]

    def handle_data(self, data: str) -> None:
        if self.is_in_cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell &= tag not in {"td", "th"}


def test_the_page_stands_alone_and_its_numbers_have_captions_and_units() -> None:
    text = page(RECORD, "a < b")
    seen = Parsed(text)
    assert text.count("<svg") == 1 and "http-equiv" not in text and "@import" not in text
    assert all(address.startswith("#") for address in seen.addresses)
    areas, points, _ = seen.tables
    assert seen.captions == 3
    assert areas[1][0] == "new" and areas[2] == ["base", "184", "184"]
    assert all("% × tokens per forward" in heading for heading in areas[0][1:])
    assert points[3][:4] == ["base", "threshold 0.95", "92.0 (184/200)", "90.0 to 94.0"]
    assert "tokens per forward" in points[0][4] and "tokens/s" in points[0][6]
    assert "92.0 % (base, threshold 0.95)" in text and "at batch size 32" in text
    assert "200 examples" in text


def test_the_page_escapes_what_it_shows() -> None:
    hostile = "<script>alert(1)</script>"
    points = [{**p, "label": hostile} for p in RECORD["points"][:1]]
    text = page({**RECORD, "points": points}, hostile)
    assert "<script>alert" not in text and text.count("<script") == 1
    assert "echo &lt;i&gt;" in text and "a &amp; b" in text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the script")
def test_the_script_sorts_numbers_as_numbers(tmp_path: Path) -> None:
    text = page(RECORD, "title")
    script = text[text.index("<script>") + len("<script>") : text.rindex("</script>")]
    (tmp_path / "sort.js").write_text(f"{FAKE_PAGE}\n{script}\n{PRESSES}")
    done = subprocess.run(
        ["node", str(tmp_path / "sort.js")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {
        "rising": ["2", "10", "100"],
        "falling": ["100", "10", "2"],
        "marks": [None, "descending"],
    }


# As much of a page as the script touches: one table with a column of names and one of numbers.
FAKE_PAGE = """
const element = (more) => ({ attributes: {}, childNodes: [], append() {}, ...more,
  getAttribute(name) { return this.attributes[name] ?? null; },
  setAttribute(name, value) { this.attributes[name] = value; },
  removeAttribute(name) { delete this.attributes[name]; } });
const rows = [["b", "10"], ["c", "2"], ["a", "100"]].map((row) => ({
  cells: row.map((value) => ({ dataset: { value } })) }));
const body = { rows, append(...sorted) { this.rows = sorted; } };
const headings = [element({}), element({})];
const presses = [];
const table = { tHead: { rows: [{ cells: headings }] }, tBodies: [body] };
globalThis.document = { querySelectorAll: () => [table],
  createElement: () => element({ addEventListener: (_, press) => presses.push(press) }) };
"""
PRESSES = """
const shown = () => body.rows.map((row) => row.cells[1].dataset.value);
presses[0]();
presses[1]();
const rising = shown();
presses[1]();
const marks = headings.map((heading) => heading.getAttribute("aria-sort"));
console.log(JSON.stringify({ rising, falling: shown(), marks }));
"""


def test_accuracy_may_be_drawn_over_what_a_position_yields(tmp_path: Path) -> None:
    points = [
        p | {"generated_tokens": 100, "num_positions": 400 * (1 + i)}
        for i, p in enumerate(RECORD["points"])
    ]
    many = [p | {"label": f"{p['label']} {i}"} for p in points for i in range(6)]
    draw({**RECORD, "points": many}, tmp_path / "a.svg", x="tokens_per_position")
    texts = {
        element.text for element in ElementTree.parse(tmp_path / "a.svg").iter() if element.text
    }
    assert {"tokens per computed position", "base 5", "new 0"} <= texts


def test_a_completion_of_no_token_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(InputError, match="`max_new_tokens` must be"):
        curves_of(["tiny-dmax"], ["spd"], [0.5], max_new_tokens=0)
