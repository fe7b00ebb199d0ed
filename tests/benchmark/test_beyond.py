"""bench/beyond.py at toy length, and its criterion on curves that are worked out by hand."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import beyond
import pytest
from beyond_page import answer, missing, page, training, unequal, write_page
from beyond_runs import BASE, DMAX, RECIPES, SEEDS, TRAINED, Run
from beyond_verdict import (
    FASTER,
    NEVER,
    SLOWER,
    SOME_SEEDS,
    TOO_FEW_SEEDS,
    Found,
    differences,
    mean_interval,
    tpf_at,
    verdict,
)
from shares import WITHIN_NOISE

from dmax.errors import InputError
from dmax.evaluation.statistics import wilson_interval
from dmax.recipe.sections import load_recipe

OPUT, MMD, CFORCE = TRAINED[:3]
ACCURACY = (480, 480, 480, 470, 440)  # of 500 problems, from careful to bold


def points(
    run: Run, decoding: str, tpfs: Sequence[float], seed: int | None = None
) -> list[dict[str, Any]]:
    """A curve with the accuracies of `ACCURACY`, at these TPF."""
    curve = run.curve(decoding, seed)
    return [
        {
            "label": curve.label,
            "model": curve.model,
            "strategy": decoding,
            "made_for": "spd",
            "dtype": "bfloat16",
            "knob": "threshold",
            "value": value,
            "correct": correct,
            "total": 500,
            "accuracy": correct / 500,
            "interval": wilson_interval(correct, 500),
            "tpf": tpf,
            "generated_tokens": 1000 * tpf,
            "num_forwards": 1000,
        }
        for value, correct, tpf in zip(curve.values, ACCURACY, tpfs, strict=True)
    ]


def record_of(*curves: list[dict[str, Any]]) -> dict[str, Any]:
    """A record with the references, and these curves."""
    bundled = [
        points(DMAX, "spd", (4, 5, 6, 7, 8)),
        points(DMAX, "mbd", (4, 5, 6, 7, 8)),
        points(BASE, "threshold", (1, 2, 3, 4, 5)),
    ]
    return {
        "limit": 500,
        "seed": 7,
        "environment": {"cpu": "a CPU", "threads": 1, "torch": "2"},
        "points": [point for curve in (*bundled, *curves) for point in curve],
    }


def shifted(run: Run, seed: int, by: float) -> list[dict[str, Any]]:
    return points(run, "spd", [tpf + by for tpf in (4, 5, 6, 7, 8)], seed)


# --- the criterion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0.95, 5.0),  # a point of the curve
        (0.92, 5.6),  # between the last two
        (0.85, 6.0),  # nothing is said beyond the last
        (0.97, None),
    ],
)
def test_the_tpf_at_an_accuracy(level: float, expected: float | None) -> None:
    curve = [{"tpf": t, "accuracy": a} for t, a in ((6.0, 0.9), (3.0, 0.96), (5.0, 0.95))]
    assert tpf_at(curve, level) == (None if expected is None else pytest.approx(expected))


def test_a_curve_that_dips_counts_where_it_is_as_accurate_last() -> None:
    curve = [{"tpf": t, "accuracy": a} for t, a in ((1, 0.9), (2, 0.8), (3, 0.9), (5, 0.7))]
    assert tpf_at(curve, 0.85) == pytest.approx(3.5)


def test_the_interval_over_seeds_is_students() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0])  # deviation 1, 4.303 / sqrt(3) = 2.484
    assert (mean, low, high) == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)
    mean, low, high = mean_interval([1.0, 3.0])  # deviation sqrt(2), 12.706 / sqrt(2) times it
    assert (mean, high - mean) == pytest.approx((2.0, 12.706), abs=1e-3)


def test_the_level_is_the_lower_end_of_the_references_interval() -> None:
    found = Found(record_of())
    assert found.level("spd") == found.level("mbd") == wilson_interval(480, 500)[0]
    assert found.level("threshold") == wilson_interval(480, 500)[0]


@pytest.mark.parametrize(
    ("ours", "control", "expected"),
    [
        ((2.0, 2.1, 1.9), (0.0, 0.1, 0.0), FASTER),
        ((2.0, 2.1, 1.9), (2.0, 1.9, 2.1), WITHIN_NOISE),  # OPUT does as much
        ((0.1, -0.1, 0.0), (-1.0, -1.1, -1.0), WITHIN_NOISE),  # OPUT only loses
        ((-1.0, -1.1, -0.9), (0.0, 0.0, 0.1), SLOWER),
        ((0.0, 3.0, -2.0), (0.0, 0.0, 0.0), WITHIN_NOISE),
        ((2.0,), (0.0,), TOO_FEW_SEEDS),
        ((2.0, 2.1, 1.9), (0.0,), TOO_FEW_SEEDS),  # one seed of the control is there
    ],
)
def test_verdicts(ours: Sequence[float], control: Sequence[float], expected: str) -> None:
    curves = [shifted(MMD, seed, by) for seed, by in zip(SEEDS, ours, strict=False)]
    curves += [shifted(OPUT, seed, by) for seed, by in zip(SEEDS, control, strict=False)]
    found = Found(record_of(*curves))
    assert verdict(found, MMD, "spd") == expected
    assert answer(found).startswith(f"**{expected.capitalize()}:** MMD by SPD.")
    assert ("Shipped as `tiny-dmax`" in answer(found)) == (expected == FASTER)


def test_a_curve_that_is_never_as_accurate_has_no_figure() -> None:
    wrong = [point for seed in SEEDS for point in failing(MMD, seed)]
    curves = [shifted(OPUT, seed, 0.0) for seed in SEEDS]
    assert verdict(Found(record_of(wrong, *curves)), MMD, "spd") == NEVER


def test_a_seed_whose_control_is_never_as_accurate_counts_against_the_start_only() -> None:
    curves = [shifted(MMD, seed, 1 + seed / 10) for seed in SEEDS]
    control = [shifted(OPUT, 1, 0.0), shifted(OPUT, 2, 0.0), failing(OPUT, 3)]
    found = Found(record_of(*curves, *control))
    assert differences(found, MMD, "spd", OPUT) == pytest.approx([1.1, 1.2])
    assert differences(found, MMD, "spd", DMAX) == pytest.approx([1.1, 1.2, 1.3])
    assert verdict(found, MMD, "spd") == FASTER


@pytest.mark.parametrize("failed", [(2, 3), (1, 2, 3)])
def test_where_the_control_falls_short_the_start_decides(failed: Sequence[int]) -> None:
    curves = [shifted(MMD, seed, 1 + seed / 10) for seed in SEEDS]
    control = [failing(OPUT, s) if s in failed else shifted(OPUT, s, 0.0) for s in SEEDS]
    found = Found(record_of(*curves, *control))
    assert verdict(found, MMD, "spd") == FASTER
    told = f"**{FASTER.capitalize()}:** MMD by SPD (against its start alone)."
    assert answer(found).startswith(told)
    one_missing = Found(record_of(*curves, *control[1:]))
    assert verdict(one_missing, MMD, "spd") == TOO_FEW_SEEDS, "that seed may still decide"


def failing(run: Run, seed: int) -> list[dict[str, Any]]:
    """A fast curve without the answers that are asked for."""
    return [point | {"accuracy": 0.5, "correct": 250} for point in shifted(run, seed, 9.0)]


# --- the head of the page -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failed", "verdict_name", "name"),
    [
        ((), FASTER, "MMD by SPD"),
        ((2,), SOME_SEEDS, "MMD by SPD (2 of 3 seeds)"),
        (SEEDS, NEVER, "MMD by SPD"),
    ],
)
def test_seeds_that_are_never_as_accurate_are_counted(
    failed: Sequence[int], verdict_name: str, name: str
) -> None:
    curves = [failing(MMD, s) if s in failed else shifted(MMD, s, 2 + s / 10) for s in SEEDS]
    control = [shifted(OPUT, seed, seed / 10) for seed in SEEDS]
    found = Found(record_of(*curves, *control))
    assert verdict(found, MMD, "spd") == verdict_name
    head = answer(found)
    assert head.startswith(f"**{verdict_name.capitalize()}:** {name}.")
    assert ("MMD by SPD writes 9.22, the mean of its seeds." in unwrapped(head)) == (not failed)


def test_the_head_says_what_no_objective_and_more_oput_do() -> None:
    control = [shifted(OPUT, seed, by) for seed, by in zip(SEEDS, (-1.0, -1.1, -0.9), strict=True)]
    head = unwrapped(answer(Found(record_of(*control))))
    assert "from 7.02 tokens a forward by SPD to 7.02 by MBD at equal accuracy" in head
    assert "`tiny-dmax` is slower at equal accuracy by SPD, TPF -1.00 (-1.25 to -0.75)." in head

    none = Found(record_of(*(failing(OPUT, seed) for seed in SEEDS)))
    assert "`tiny-dmax` is never as accurate by SPD, TPF not compared." in unwrapped(answer(none))


def test_a_verdict_over_fewer_seeds_says_so() -> None:
    curves = [shifted(MMD, seed, 1 + seed / 10) for seed in SEEDS]
    control = [shifted(OPUT, 1, 0.0), shifted(OPUT, 2, 0.0), failing(OPUT, 3)]
    found = Found(record_of(*curves, *control))
    assert answer(found).startswith("**Faster at equal accuracy:** MMD by SPD (2 of 3 seeds).")
    assert ", 2 of 3 seeds | +1.20 (+0.95 to +1.45) |" in page(found)


def test_what_a_run_does_not_share_with_its_control_is_listed() -> None:
    gpu = {"gpu": "a GPU", "torch": "2"}
    curves = [shifted(CFORCE, 3, 0.0), [p | {"environment": gpu} for p in shifted(OPUT, 3, 0.0)]]
    record = record_of(*curves, shifted(MMD, 3, 0.0))
    record["training"] = {"cforce-3": trained(record["environment"]), "oput-3": trained(gpu)}
    record["training"]["cforce-3"]["precision"] = "float32"
    mmd, cforce = unequal(Found(record)).splitlines()
    assert mmd.startswith("- MMD: sequences 3,200 (control: 9,600); warmup steps 12 (control: 50)")
    assert cforce == (
        "- CForce: answers of `tiny-dmax` (control: `tiny-base`); trained and decoded on "
        "a CPU, threads: 1, seed 3 trained in float32 (control: a GPU)."
    )


def test_the_table_of_runs_has_their_overrides_and_the_time_of_decoding() -> None:
    run = next(run for run in TRAINED if run.overrides)
    record = record_of([p | {"tokens_per_second": 100.0} for p in shifted(run, 1, 0.0)])
    for decoding in ("mbd", "threshold"):
        more = points(run, decoding, (4, 5, 6, 7, 8), 1)
        record["points"] += [point | {"tokens_per_second": 100.0} for point in more]
    record["training"] = {f"{run.name}-1": trained(record["environment"])}
    row = training(Found(record)).splitlines()[2]
    assert "tiny_oput_sample.yaml), `max_steps: 600`, `warmup_steps: 50` |" in row
    assert "| 1.5 | 15.0 |" in row  # 90 s; three curves of 30,000 tokens


def trained(environment: dict[str, Any]) -> dict[str, Any]:
    return {"steps": 600, "batch_size": 16, "seconds": 90, "environment": environment}


def unwrapped(text: str) -> str:
    return " ".join(text.split())


# --- what is missing ------------------------------------------------------------------------------


def test_what_is_not_measured_is_listed_with_its_command() -> None:
    both = [points(MMD, decoding, (4, 5, 6, 7, 8), 2) for decoding in ("spd", "mbd")]
    half = shifted(MMD, 3, 0.0)[:-1]  # a curve that was interrupted
    listed = missing(Found(record_of(*both, half))).splitlines()
    assert "- MMD: `python bench/beyond.py --only mmd --seeds 1 3`" in listed
    assert "- OPUT goes on: `python bench/beyond.py --only oput --seeds 1 2 3`" in listed


def test_every_run_has_its_recipe_or_is_left_out() -> None:
    """Recipes go on from the model that the page says, at the length of their control."""
    present = [run for run in TRAINED if run.path.is_file()]
    assert OPUT in present
    for run in present:
        assert load_recipe(run.path).model.path == run.start


def test_the_page_of_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_page(record_of(*(shifted(MMD, seed, 1.0) for seed in SEEDS)), tmp_path)
    text = (tmp_path / "beyond.md").read_text()
    assert "| MMD | SPD | 0.5 | 480, 480, 480 | 1440/1500 (96.0 %) |" in text
    assert (tmp_path / "beyond-mbd.svg").is_file()


def test_the_published_page_is_that_of_the_published_record() -> None:
    results = RECIPES.parent / "docs" / "results"
    found = Found(json.loads((results / "beyond.json").read_text(encoding="utf-8")))
    assert page(found) == (results / "beyond.md").read_text(encoding="utf-8")


def test_data_is_made_once_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TRAINED[0]
    data = tmp_path / "tiny_responses.jsonl"
    commands = list[list[str]]()

    def run_command(command: list[str], check: bool) -> Namespace:
        commands.append(command)
        return Namespace(returncode=0)

    monkeypatch.setattr(beyond.subprocess, "run", run_command)
    beyond.make_data(run, tmp_path, toy=True)
    data.write_text("{}\n" * 6)  # of 8
    beyond.make_data(run, tmp_path, toy=True)
    assert len(commands) == 2
    assert commands[0][1:4] == ["-m", "dmax", "distill"] and str(data) in commands[0]
    data.with_suffix(".dropped.jsonl").write_text("{}\n" * 2)
    beyond.make_data(run, tmp_path, toy=True)
    assert len(commands) == 2


def test_data_that_cannot_be_made_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beyond.subprocess, "run", lambda *_, **__: Namespace(returncode=2))
    with pytest.raises(InputError) as told:
        beyond.make_data(OPUT, tmp_path, toy=True)
    assert "the data of OPUT goes on could not be made: `python -m dmax distill" in str(told.value)
    assert str(told.value).endswith("ended with exit code 2")


def test_a_seed_that_is_given_twice_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    done = list[int]()
    monkeypatch.setattr(beyond, "do_bundled", lambda *_: None)
    monkeypatch.setattr(beyond, "make_data", lambda *_: None)
    monkeypatch.setattr(beyond, "do", lambda run, seed, options, output: done.append(seed))
    monkeypatch.setattr(beyond, "write_page", lambda *_: None)
    given = ["--only", "mmd", "--seeds", "2", "1", "2", "--output", str(tmp_path)]
    (tmp_path / "beyond.json").write_text(json.dumps(record_of()))
    beyond.main(given)
    assert done == [2, 1]


# --- all of it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module lie, with the data that they share."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [run for run in TRAINED if run.path.is_file()], ids=lambda run: run.name
)
def test_every_recipe_trains_at_toy_length(run: Run, root: Path) -> None:
    pytest.importorskip("accelerate")
    beyond.make_data(run, root, toy=True)
    beyond.train(run, 1, Namespace(runs=root, toy=True, gpu=False))
    said = json.loads((root / run.folder(1) / "dmax.json").read_text())
    assert (said["recipe"], said["steps"]) == (run.path.name, 2)


@pytest.mark.slow
def test_it_trains_measures_and_goes_on(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("accelerate")
    arguments = ["--toy", "--limit", "2", "--only", "mbd", "--seeds", "2"]
    arguments += ["--runs", str(root), "--output", str(tmp_path)]
    beyond.main(arguments)
    record = json.loads((tmp_path / "beyond.json").read_text())
    assert record["training"]["mbd-2"]["steps"] == 2
    labels = [point["label"] for point in record["points"]]
    assert len(labels) == 5 + 2 * 5 + 2 * 5
    assert labels.count("two-block OPUT, MBD, seed 2") == 5
    assert "training mbd-2" in capsys.readouterr().out

    del record["points"][-1]
    (tmp_path / "beyond.json").write_text(json.dumps(record))
    beyond.main([*arguments, "--no-training"])
    assert capsys.readouterr().out.count("TPF") == 1  # the point that was gone

    again = json.loads((tmp_path / "beyond.json").read_text())
    assert [point["label"] for point in again["points"]] == labels
    assert again["training"] == record["training"]

    beside = tmp_path / "beside"
    beyond.main([*arguments, "--no-training", "--jobs", "2", "--output", str(beside)])
    by_jobs = json.loads((beside / "beyond.json").read_text())
    assert tpfs(by_jobs) == tpfs(again)
    assert by_jobs["training"] == again["training"]


def tpfs(record: dict[str, Any]) -> dict[tuple[str, float], float]:
    """The TPF of every point."""
    return {(point["label"], point["value"]): point["tpf"] for point in record["points"]}
