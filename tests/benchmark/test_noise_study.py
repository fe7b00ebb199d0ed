"""bench/noise.py at toy length: its noise, its stages, and the page that it writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import noise  # noqa: E402
import noise_findings  # noqa: E402
import noise_kinds  # noqa: E402
import noise_page  # noqa: E402
import noise_plan  # noqa: E402
import noise_points  # noqa: E402
from shares import Share  # noqa: E402

from dmax.recipe.sections import load_recipe  # noqa: E402
from dmax.tiny.tokenizer import build_tokenizer  # noqa: E402

ROOT = Path(noise.__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
BUNDLED = noise_plan.DESIGNS[noise_plan.BUNDLED]


def test_a_toy_study_is_measured_once_and_written_as_a_page(
    noise_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results"
    given = ["--toy", "--recipe", str(noise_recipe), "--only", "sampled", "random"]
    places = ["--runs", str(tmp_path / "runs"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["noise.py", *given, *places])
    monkeypatch.setattr(noise, "LOOKED_AT", (1,))
    run = noise_plan.Run("random", 8e-4, 1)
    noise.main()
    points = json.loads((output / "noise.json").read_text())["points"]
    measured = {(point["label"], point["strategy"], point["value"]) for point in points}
    labels = {f"{kind}, rate 0.0008, 1 steps, seed 1" for kind in noise_kinds.PAIR}
    soft = {(label, "spd", value) for label in ("base", *labels) for value in (0.0, 0.5)}
    assert measured == {("base", "threshold", 0.95), *soft}
    looks = json.loads((output / "noise_tokens.json").read_text())["looks"]
    assert looks.keys() == labels | {noise_plan.base_label(ratio) for ratio in noise_plan.RATIOS}
    assert looks[run.label(1)].keys() == set(noise_kinds.OF_TRAINED)
    page = (output / "noise.md").read_text()
    assert "own tokens are better than random ones beyond chance in" in " ".join(page.split())
    assert "| random tokens | 8e-4 | all |" in page
    assert (output / "noise.svg").read_text().startswith("<?xml")

    capsys.readouterr()
    noise.main()
    assert "training" not in capsys.readouterr().out
    assert (output / "noise.md").read_text() == page


def test_comparisons_are_complete_before_the_next_steps_begin() -> None:
    steps, rates, seeds = BUNDLED.steps, BUNDLED.rates, BUNDLED.seeds
    stages = list(noise_plan.plan(noise_kinds.PAIR, rates, seeds, steps))
    assert len(set(stages)) == len(stages) == 2 * 3 * 3 * 6
    for first, second in zip(stages[::2], stages[1::2], strict=True):
        assert {first[0].noise, second[0].noise} == set(noise_kinds.PAIR)
        assert replace(first[0], noise="") == replace(second[0], noise="")
        assert first[1] == second[1]
    steps = [number for _, number in stages]
    assert steps[:12:2] == [25, 50, 100, 200, 400, 25]
    assert steps[-18:] == [1200] * 18


def test_a_label_names_its_stage() -> None:
    run = noise_plan.Run("same-kind", 8e-06, 3)
    assert noise_plan.stage_of(run.label(1200)) == (run, 1200)


def test_tokens_of_the_same_kind_are_numbers_for_numbers_and_eos_for_eos() -> None:
    tokenizer = build_tokenizer()
    names, kinds = noise_kinds.token_kinds(tokenizer, len(tokenizer))
    number, eos, mask = tokenizer.encode(" 12")[0], tokenizer.eos_token_id, tokenizer.mask_token_id
    assert names[kinds[number]] == "number, spaced"
    ids = torch.tensor([[number] * 4000, [eos] * 4000, [mask] * 4000])
    drawn = noise_kinds.same_kind_tokens(ids, kinds, torch.Generator().manual_seed(0))
    assert set(drawn[0].tolist()) == set((kinds == kinds[number]).nonzero().flatten().tolist())
    assert set(drawn[1:].flatten().tolist()) == {eos, mask}


def test_random_tokens_at_errors_leave_what_is_right_and_draw_no_mask() -> None:
    own = torch.tensor([[1, 2, 3] * 500])
    clean = torch.tensor([[1, 5, 3] * 500])
    generator = torch.Generator().manual_seed(0)
    noisy = noise_kinds.at_errors(own, clean, 6, 4, generator)
    assert (noisy[own == clean] == clean[own == clean]).all()
    assert set(noisy[own != clean].tolist()) == {0, 1, 2, 3, 5}


def test_wrong_tokens_are_counted_as_plausible_mended_and_broken() -> None:
    probs = torch.full((1, 4, 100), 0.4 / 98)
    probs[..., 0], probs[..., 1] = 0.588, 0.012
    kinds = torch.zeros(100, dtype=torch.int64)
    kinds[50:] = 1
    noisy = torch.tensor([[0, 1, 60, 1]])
    clean = torch.tensor([[0, 0, 0, 0]])
    counted = torch.tensor([[True, True, True, False]])
    found = noise_kinds.count_tokens(noisy, clean, counted, probs.log(), kinds)
    assert found == {"positions": 3, "wrong": 2, "plausible": 1, "top": 2, "same kind": 1}
    predicted = torch.tensor([[5, 0, 60, 0]])
    mended = noise_kinds.count_mended(predicted, noisy, clean, counted)
    assert mended == {"mended": 1, "right": 1, "broken": 1}


def compared(rate: float, own: int, random: int, steps: int = 25) -> noise_points.Comparison:
    """So many problems of 200 that own and random tokens solve in a setting."""
    shares = (Share(own, 200, 6.0), Share(random, 200, 5.0))
    return noise_points.Comparison(rate, steps, 0.5, (1,), *shares)


def test_the_sentence_counts_settings_and_names_the_largest_differences() -> None:
    level = [compared(8e-5, 100, 101)]
    none = noise_findings.sentence(level, planned=1)
    assert none.startswith(
        "On-policy noise has not been seen to help here: own tokens are better than random ones "
        "beyond chance in 0 of 1 settings and worse in 0."
    )
    apart = [compared(8e-5, 150, 100), compared(8e-4, 10, 100)]
    both = noise_findings.sentence(apart, planned=36)
    assert both.startswith("On-policy noise matters after 25 steps at a rate of 8e-5: ")
    assert "in 1 of the 2 settings measured so far (36 are planned) and worse in 1." in both
    assert both.endswith(" 1 of the 1 rest on one seed.")
    assert noise_findings.extremes(level) == ""
    most = noise_findings.extremes(apart)
    assert "they gain is after 25 steps at 8e-5, threshold 0.5, seed 1: 150/200 (75.0 %)" in most
    assert "they lose is after 25 steps at 8e-4, threshold 0.5, seed 1: 10/200 (5.0 %)" in most


def test_where_own_tokens_lead_is_told_by_the_rate_times_the_steps() -> None:
    leads = [compared(8e-6, 150, 100, steps=400), compared(8e-5, 150, 100, steps=100)]
    others = [compared(8e-5, 100, 100, steps=40), compared(8e-4, 100, 100, steps=1)]
    later = [compared(8e-4, 10, 100, steps=100)]
    told = noise_findings.how_far([*leads, *others, *later])
    assert "in 2 of the 3 settings in which the rate times the steps is 0.0032 to 0.008" in told
    assert "in none of the 1 below and the 1 above." in told
    assert noise_findings.how_far([*others, *later]) == ""
    assert noise_findings.how_far(leads[:1]) == "", "one rate has nothing in common with others"


def test_what_was_expected_is_held_against_what_came() -> None:
    found = [compared(3e-4, 150, 100), compared(3e-4, 100, 100, steps=50)]
    found += [compared(3e-4, 100, 100, steps=100), compared(3e-5, 150, 100)]
    told = noise_findings.as_expected(found, ((3e-4, 25), (3e-4, 50)))
    assert told == (
        "Own tokens were expected to lead after 25 and 50 steps at a rate of 3e-4: they do in 1 of "
        "2 settings there, and in 1 of 2 others."
    )
    first = noise_findings.as_expected(found[:1], ((3e-4, 25), (3e-4, 50)))
    assert first.endswith("in 1 of 1 settings there. No other setting is measured yet.")
    later = noise_findings.as_expected(found[3:], ((3e-4, 25), (3e-4, 50)))
    assert later.endswith("of which nothing is measured yet. They do in 1 of 1 others.")


@pytest.mark.parametrize(
    ("at_errors", "same_kind", "so"),
    [
        (100, 100, "It matters which wrong tokens stand where the model errs."),
        (150, 100, "Whether their number or their place makes the difference, these controls do"),
        (150, 150, "Neither the number nor the kind"),
    ],
)
def test_the_controls_tell_the_number_of_wrong_tokens_from_which_they_are(
    at_errors: int, same_kind: int, so: str
) -> None:
    solved = {"sampled": 150, "random": 100, "at-errors": at_errors, "same-kind": same_kind}
    points = [
        {
            "label": noise_plan.Run(noise, 8e-4, 2).label(25),
            "value": 0.5,
            "correct": correct,
            "total": 200,
            "generated_tokens": 10,
            "num_forwards": 2,
        }
        for noise, correct in solved.items()
    ]
    measured = noise_points.Points({"points": points}, [])
    looks = json.loads((RESULTS / "noise_tokens.json").read_text())["looks"]
    told = noise_findings.controls(measured)
    assert so in told
    assert so in noise_findings.reasons(measured, looks)[1]
    assert told.count(" of 1 settings, worse in 0 (seed 2)") == 2


def test_a_study_without_controls_leaves_them_out_and_says_what_the_base_solves(
    tmp_path: Path,
) -> None:
    def point(label: str, strategy: str, value: float, correct: int) -> dict[str, object]:
        counts = {"correct": correct, "total": 200, "generated_tokens": 600, "num_forwards": 200}
        figures = {"tokens_per_second": 100.0, "dtype": "float32"}
        return {"label": label, "strategy": strategy, "value": value} | counts | figures

    base = [point("base", "threshold", 0.95, 150), point("base", "spd", 0.0, 90)]
    base.append(point("base", "spd", 0.5, 140))
    solved = {"sampled": 160, "random": 100}
    trained = [
        point(noise_plan.Run(noise, 3e-4, 1).label(25), "spd", 0.5, correct)
        for noise, correct in solved.items()
    ]
    environment = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    record = {"limit": 200, "environment": environment, "points": [*base, *trained]}
    looks = json.loads((RESULTS / "noise_tokens.json").read_text())
    name = noise_plan.PRETRAINED
    (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / f"{name}_tokens.json").write_text(json.dumps(looks))
    design = noise_plan.DESIGNS[name]
    records = (tmp_path / f"{name}.json", tmp_path / f"{name}_tokens.json")
    noise_page.write_page(*records, design)
    page = " ".join((tmp_path / f"{name}.md").read_text().split())
    assert page.startswith("# When on-policy noise matters on a pretrained model On-policy noise")
    assert "matters after 25 steps at a rate of 3e-4" in page
    assert "the 1 settings measured so far (12 are planned)" in page
    assert "the base solves 150/200 (75.0 %) at TPF 3.00 by threshold 0.95" in page
    assert "same kind" not in page.partition("## Where the noise differs")[0]
    assert "What came of the reasons" not in page
    assert "| own tokens, argmax |" not in page.partition("## What is measured")[2]
    told = noise_findings.elsewhere(
        noise_points.Points(record, []), name, "On a pretrained model", []
    )
    assert told.startswith(f"[On a pretrained model]({name}.md), own tokens")
    assert "own tokens are better in 1 of 1 settings, and worse in 0." in told


def test_noises_that_ran_on_different_machines_are_counted() -> None:
    def point(noise: str, **changes: object) -> dict[str, object]:
        label = noise_plan.Run(noise, 3e-4, 1).label(25)
        counts = {"correct": 1, "total": 2, "generated_tokens": 6, "num_forwards": 2}
        return {"label": label, "value": 0.5, "dtype": "float32"} | counts | changes

    environment = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    found = [point("sampled"), point("random"), point("argmax", dtype="bfloat16")]
    found.append(point("same-kind", environment=environment | {"cpu": "another"}))
    found.append(point("at-errors"))
    record = {"environment": environment, "points": found}
    assert noise_page.alike(record, noise_points.Points(record, [])) == (
        "Own and random tokens of a seed ran on the same hardware in the same precision in 1 of 1 "
        "pairs, own tokens and the other noises in 1 of 3."
    )


def test_a_study_reads_the_base_and_the_data_of_its_size() -> None:
    design = noise_plan.DESIGNS[noise_plan.PRETRAINED_GPU]
    recipe = design.read(ROOT / design.recipe)
    assert recipe.model.path == "runs/pretrained_gpu-base"
    assert recipe.data.file == "runs/pretrained_gpu_responses.jsonl"
    design = noise_plan.DESIGNS[noise_plan.PRETRAINED]
    assert design.read(ROOT / design.recipe) == load_recipe(ROOT / design.recipe)


def test_which_noise_decodes_faster_is_told() -> None:
    def compared(own: tuple[int, float], other: tuple[int, float]) -> noise_points.Comparison:
        shares = (Share(solved, 200, tpf) for solved, tpf in (own, other))
        return noise_points.Comparison(3e-4, 25, 0.5, (1,), *shares)

    better = compared((150, 3.0), (100, 2.0))
    slower = compared((101, 2.0), (100, 3.0))
    level = compared((101, 2.0), (100, 2.0))
    assert noise_findings.speed([]) == ""
    told = "At the same threshold, models trained on own tokens write more tokens a forward in 1 of"
    assert noise_findings.speed([better]) == f"{told} 1 settings."
    assert noise_findings.speed([better, slower, level]) == (
        f"{told} 3 settings. Where neither noise is better, models trained on random tokens write "
        "more in 1 of 2."
    )


def test_seeds_that_do_not_agree_are_told() -> None:
    def points(second: int) -> noise_points.Points:
        solved = {
            ("sampled", 1): 150,
            ("random", 1): 100,
            ("sampled", 2): second,
            ("random", 2): 110,
        }
        counts = {"total": 200, "generated_tokens": 10, "num_forwards": 2, "value": 0.5}
        found = [
            {"label": noise_plan.Run(noise, 3e-4, seed).label(50), "correct": correct} | counts
            for (noise, seed), correct in solved.items()
        ]
        return noise_points.Points({"points": found}, [])

    def told(second: int) -> str:
        measured = points(second)
        return noise_findings.by_seed(measured, list(measured.comparisons("random")))

    assert told(105).startswith("In 1 of the 1 settings with several seeds, the seeds disagree")
    assert told(105).endswith("1 of them counts as better or worse above.")
    assert told(115) == ""
    assert told(110) == "", "level is neither ahead nor behind"


@pytest.mark.parametrize("name", noise_plan.DESIGNS)
def test_the_committed_pages_are_what_their_records_say(name: str, tmp_path: Path) -> None:
    for file in (*RESULTS.glob("noise*.json"), RESULTS / "pretrained.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if not (tmp_path / f"{name}.json").is_file():
        pytest.skip("nothing is measured yet")
    design = noise_plan.DESIGNS[name]
    records = (tmp_path / f"{name}.json", tmp_path / f"{name}_tokens.json")
    noise_page.write_page(*records, design)
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize(
    "given",
    [
        ("--rates", "-1"),
        ("--rates", "8e-4", "nan"),
        ("--steps", "0"),
        ("--steps", "2.5"),
        ("--seeds", "-1"),
        ("--limit", "0"),
        ("--held-out", "many"),
        ("--minutes", "-5"),
        ("--study", "another"),
    ],
)
def test_senseless_options_are_refused_before_a_page_is_written(
    given: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["noise.py", "--page", *places, *given])
    with pytest.raises(SystemExit) as ended:
        noise.main()
    assert ended.value.code == 2
    assert f"argument {given[0]}: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--rates", "5"), "the study has the rates 0.0008, 8e-05, 8e-06, got 5.0"),
        (("--rates", "8e-4", "8e-7"), "the rates 0.0008, 8e-05, 8e-06, got 8e-07"),
        (("--steps", "7", "25", "9"), "the steps 25, 50, 100, 200, 400, 1200, got 7, 9"),
        (("--toy", "--steps", "25"), "the study has the steps 1, got 25"),
        (
            ("--study", noise_plan.PRETRAINED, "--only", "argmax"),
            "the study has the noises sampled, random, got argmax",
        ),
    ],
)
def test_what_a_study_does_not_plan_is_refused(
    given: tuple[str, ...], told: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert told in refusal("noise", "--page", "--output", str(tmp_path), *given)
    assert not list(tmp_path.iterdir())


def test_the_page_is_whole_whatever_part_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (*RESULTS.glob("noise*.json"), RESULTS / "pretrained.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    record = tmp_path / f"{noise_plan.BUNDLED}.json"
    points = json.loads(record.read_text())
    short = [p for p in points["points"] if ", 1200 steps," not in p["label"]]
    record.write_text(json.dumps(points | {"points": short}))
    part = ["--only", "random", "--rates", "8e-5", "--steps", "25", "--seeds", "1"]
    places = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["noise.py", "--page", *part, *places])
    noise.main()
    page = (tmp_path / f"{noise_plan.BUNDLED}.md").read_text()
    assert "(36 are planned)" in " ".join(page.split())
    assert "| own tokens, argmax | 8e-5 |" in page.partition("## What is measured")[2]


def test_a_base_that_is_not_there_yet_is_named_with_what_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / noise_plan.DESIGNS[noise_plan.PRETRAINED].recipe
    places = ["--recipe", str(recipe), "--output", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["noise.py", "--study", noise_plan.PRETRAINED, *places])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        noise.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "runs/pretrained-base is not there yet" in told
    assert "run `python bench/pretrained.py convert problems ar base responses` first" in told
    assert not list(tmp_path.iterdir())
