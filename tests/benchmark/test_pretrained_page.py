"""bench/smollm/page.py: what it says of a record, whole or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretrained
import pytest
from smollm import measure
from smollm.page import headline, results, where_it_fell, write_page
from smollm.size import CPU, GPU, Size

Solved = dict[str, list[tuple[int, float]]]
SOLVED: Solved = {  # by label: right answers of 200 and TPF, at one threshold after the other
    "original, where the base starts": [(122, 0.97)],
    "original, as long as the base": [(191, 0.97)],
    "base, threshold": [(158, 1.3), (136, 2.4), (42, 4.59)],
    "DMax, SPD": [(178, 1.18), (164, 2.8), (181, 3.0)],
    "base, SPD": [(169, 1.85)],
    "masks only, threshold": [(175, 1.69), (91, 6.86)],
    "masks only, SPD": [(188, 1.62), (154, 3.19), (154, 3.69)],
    "random tokens, SPD": [(181, 1.63), (170, 3.16), (170, 3.43)],
}


def record_of(size: Size, solved: Solved) -> dict[str, Any]:
    """A record in which only these curves are measured."""
    points = {
        measure.slug(curve, value): dict(correct=correct, total=200, tpf=tpf, interval=(0, 1))
        for curve in pretrained.curves(size)
        for value, (correct, tpf) in zip(curve.values, solved.get(curve.label, []), strict=False)
    }
    return {
        "points": points,
        "stages": {name: {"is_done": False, "steps": 0, "log": []} for name in pretrained.TRAINED},
        "limit": 200,
        "seed": 7,
        "dtype": "float32",
        "vocabulary": 900,
        "references": 0.4,
        "environment": {"cpu": "a CPU", "threads": 1, "torch": "2"},
    }


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
def test_a_page_names_what_is_missing_and_how_to_measure_it(size: Size) -> None:
    curves = pretrained.curves(size)
    table = "\n".join(results(size, record_of(size, {}), curves))
    assert table.count("not measured yet") == sum(len(curve.values) for curve in curves)
    assert f"`{size.command} ar ar-longer base oput masks random measure`" in table


def found(solved: Solved, size: Size = CPU) -> str:
    """The head of the page, in one line."""
    return " ".join(headline(record_of(size, solved), pretrained.curves(size)).split())


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
def test_the_head_of_a_page_says_what_was_found(size: Size) -> None:
    assert found(SOLVED, size).startswith(
        "**In short:** The careful base, at threshold 0.95, solves 158/200 at TPF 1.30. DMax, at "
        "0.3, solves 181/200 at TPF 3.00, 11.5 points more than the base (+4.5 to +18.5). At 0.5 "
        "it dips to 164/200 at TPF 2.80. The autoregressive original, trained as long as the base, "
        "writes one token at a time and solves 191/200 at TPF 0.97, 5.0 points more than DMax "
        "(-0.1 to +10.3). Over masks only, on-policy noise bought accuracy beyond chance at 1 of 3 "
        "thresholds. It cost tokens a forward at 3 of 3. At 0.3 masks only solve 154/200 at TPF "
        "3.69, DMax 13.5 points more (+6.3 to +20.6). Over random tokens, on-policy noise bought "
        "no accuracy beyond chance. It cost tokens a forward at 3 of 3. At 0.3 random tokens solve "
        "170/200 at TPF 3.43, DMax 5.5 points more (-1.0 to +12.0). The most right answers by SPD "
        "are 188/200 at TPF 1.62, of masks only at 0.95. Each model was trained with one seed."
    )


def test_the_head_says_where_noise_cost_accuracy() -> None:
    said = found(SOLVED | {"DMax, SPD": [(178, 1.7), (130, 2.8), (100, 4.0)]})
    assert (
        "Over random tokens, on-policy noise bought no accuracy beyond chance. It cost accuracy "
        "beyond chance at 2 of 3 and tokens a forward at 1 of 3. At 0.3 random tokens solve "
        "170/200 at TPF 3.43, DMax 35.0 points fewer ("
    ) in said
    assert "dips" not in said


def test_of_models_that_solve_as_much_the_head_names_the_faster_one() -> None:
    controls = {
        "masks only, SPD": [(188, 1.62), (188, 3.19), (188, 10.69)],
        "random tokens, SPD": [(188, 1.63), (188, 3.16), (188, 9.43)],
    }
    said = "The most right answers by SPD are 188/200 at TPF 10.69, of masks only at 0.3."
    assert said in found(SOLVED | controls)


@pytest.mark.parametrize(
    ("solved", "said"),
    [
        ([(169, 1.85)], "does not collapse** on this base, unlike in the paper and on the bundled"),
        (
            [(3, 0.9)],
            "collapses** on this base, as in the paper and on the bundled model: 3/200 at TPF 0.90,"
            " against 158/200 at TPF 1.30 by threshold decoding at 0.95.",
        ),
        ([], None),
    ],
)
def test_the_page_says_whether_spd_collapses_without_oput(
    solved: list[tuple[int, float]], said: str | None, tmp_path: Path
) -> None:
    record = record_of(CPU, SOLVED | {"base, SPD": solved})
    write_page(CPU, record, pretrained.curves(CPU), tmp_path / "page.md")
    page = " ".join((tmp_path / "page.md").read_text().split())
    failed = page.partition("## What failed")[2]
    assert ("SPD without OPUT" in failed) == (said is not None)
    assert said is None or f"**SPD without OPUT {said}" in failed
    assert "the tables above" not in page


def test_the_head_compares_only_what_is_measured() -> None:
    measured = {"base, threshold": SOLVED["base, threshold"]}
    half = measured | {"DMax, SPD": [(178, 1.18)]}
    for solved in (measured, half):
        said = found(solved)
        assert said.startswith("**So far:** The careful base, at threshold 0.95, solves 158/200 at")
        assert " at TPF 1.30. Each model was trained with one seed." in said
        assert "**Still to come:** original, where the base starts; original, as long as" in said
    said = found(measured | {label: SOLVED[label] for label in ("DMax, SPD", "masks only, SPD")})
    assert "Over masks only" in said
    assert "Over random tokens" not in said
    assert "The autoregressive original" not in said
    assert found({}).startswith("**So far:** nothing can be compared. **Still to come:** original")


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
@pytest.mark.parametrize(
    ("labels", "rows"), [((), 0), (("DMax, SPD", "base, SPD"), 1), (SOLVED, 7)]
)
def test_a_page_compares_dmax_at_the_same_thresholds(
    size: Size, labels: Sequence[str], rows: int, tmp_path: Path
) -> None:
    record = record_of(size, {label: SOLVED[label] for label in labels})
    write_page(size, record, pretrained.curves(size), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    table, _, _ = page.partition("## DMax against")[2].partition("## Stages")
    assert table.count(" points (") == rows
    assert ("## What failed" in page) == (size is CPU)
    assert "worded at random, so 0.400 is no lower bound" in " ".join(page.split())


def test_a_page_counts_the_held_out_problems_and_says_what_a_gpu_has_done(tmp_path: Path) -> None:
    size = replace(CPU, num_held_out=96)
    path = tmp_path / "page.md"
    write_page(size, record_of(size, SOLVED), pretrained.curves(size), path)
    page = path.read_text()
    assert "Loss on 96 held-out problems" in page
    assert "Nothing of that has been measured yet." in page
    (tmp_path / f"{GPU.name}.json").write_text("{}")
    write_page(size, record_of(size, SOLVED), pretrained.curves(size), path)
    assert f"[a page of its own]({GPU.name}.md)" in " ".join(path.read_text().split())


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"base": [], "oput": []}, "nowhere yet"),
        ({"base": [1.1]}, "nowhere yet"),
        ({"base": [1.1, 0.6], "oput": [2.4, 2.5, 0.7]}, "in every stage that has been run"),
        ({"base": [1.1, 0.6], "oput": [0.6, 0.6], "masks": []}, "in 1 of 2 stages, not in oput"),
    ],
)
def test_the_page_says_in_which_stages_held_out_loss_fell(
    ends: dict[str, list[float]], said: str
) -> None:
    stages = {
        name: {"log": [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]}
        for name, losses in ends.items()
    }
    assert where_it_fell({"stages": stages}) == said
