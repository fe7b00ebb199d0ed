"""bench/paper.py: what it measures beside the sweeps, with few problems."""

from __future__ import annotations

from pathlib import Path

import ablation_training
import pytest
from paper import corrections, digest, forward_times, measure, revisions
from paper_plan import MEASURED

from dmax import LLM, DecodingParams
from dmax.recipe.sections import load_recipe
from dmax.tasks.word_problems import problems

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-dmax", dtype="float32", device="cpu", max_batch_size=1)


def test_forwards_of_both_ways_are_timed(llm: LLM) -> None:
    times = forward_times(llm, num=1, repeats=2)
    assert set(times["milliseconds"]) == {"threshold", "spd"}
    assert all(len(each) == 2 and min(each) > 0 for each in times["milliseconds"].values())
    assert min(times["ratios"]) <= times["ratio"] <= max(times["ratios"])


def test_threshold_decoding_never_revises(llm: LLM) -> None:
    questions = [problem.question for problem in problems(2, seed=7, split="test")]
    kept = revisions(llm, questions, DecodingParams("threshold", 0.5))
    open_ones = revisions(llm, questions, DecodingParams("spd", 0.0))
    assert kept["changes"] == 0 < kept["chances"]
    assert 0 < open_ones["changes"] < open_ones["chances"]


def test_corrections_count_every_masked_position_once(llm: LLM) -> None:
    counts = corrections(llm, num=4)
    assert 0 <= counts["mended"] <= counts["wrong"]
    assert 0 <= counts["broken"] <= counts["right"]
    answers = problems(4, seed=7, split="test")
    num_tokens = sum(len(llm.tokenizer.encode(each.response)) for each in answers)
    assert 0.5 * num_tokens < counts["wrong"] + counts["right"] <= 4 * 256


def test_every_measure_is_written_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = ("revisions", "corrections", "forward_times")
    monkeypatch.setattr("paper.LLM", lambda path, **options: path)
    monkeypatch.setattr("paper.digest", lambda path: f"weights of {path}")
    for name in functions:
        monkeypatch.setattr(f"paper.{name}", lambda *given, name=name: {"by": name})
    output = tmp_path / "measures.json"
    first = measure(output)
    measured_by = {each["by"] for name, each in first.items() if name != "environment"}
    assert measured_by == set(functions)
    for name in functions:
        monkeypatch.setattr(f"paper.{name}", lambda *given: pytest.fail("measured again"))
    assert measure(output) == first


def test_a_retrained_model_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "measures.json"
    weights = dict.fromkeys(MEASURED.values(), "old")
    monkeypatch.setattr("paper.LLM", lambda path, **options: path)
    monkeypatch.setattr("paper.digest", weights.__getitem__)
    for name in ("revisions", "corrections", "forward_times"):
        monkeypatch.setattr(f"paper.{name}", lambda path, *given: {"with": weights[path]})
    measure(output)
    weights[MEASURED["random tokens"]] = "new"
    found = {name: each["with"] for name, each in measure(output).items() if "with" in each}
    again = [name for name, version in found.items() if version == "new"]
    assert len(again) == 3 and all(name.endswith(", random tokens") for name in again)


def test_what_was_measured_before_digests_were_kept_counts_as_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = (ROOT / "docs" / "results" / "measures.json").read_bytes()
    (tmp_path / "measures.json").write_bytes(held)
    monkeypatch.setattr("paper.LLM", lambda *_, **__: pytest.fail("measured again"))
    measure(tmp_path / "measures.json")
    assert (tmp_path / "measures.json").read_bytes() == held


def test_weights_are_told_apart() -> None:
    assert digest("tiny-base") != digest("tiny-dmax")


def test_answers_that_were_cut_off_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any model is trained on them."""
    begun = list[int]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ablation_training.py"])
    monkeypatch.setattr(ablation_training, "RECIPE", ROOT / ablation_training.RECIPE)
    monkeypatch.setattr(ablation_training, "LLM", lambda *_, **__: None)
    monkeypatch.setattr(ablation_training, "ModelAnswerer", lambda *_: None)
    monkeypatch.setattr(
        ablation_training, "distill", lambda answerer, prompts, files: begun.append(len(prompts))
    )
    monkeypatch.setattr(ablation_training, "run_recipe", lambda *_, **__: None)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny_responses.jsonl").write_text("{}\n" * 128)
    ablation_training.main()
    (tmp_path / "runs" / "tiny_responses.jsonl").write_text("{}\n" * 5000)
    ablation_training.main()
    assert begun == [5000]


def test_the_ablation_varies_one_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipes = list(ablation_training.recipes())
    assert len({recipe.output_dir for recipe in recipes}) == len(recipes) == 18
    published = load_recipe(ablation_training.RECIPE)
    for recipe in recipes:
        assert recipe.data == published.data
        changed = {
            name for name, value in recipe.training.items() if published.training.get(name) != value
        }
        assert changed <= {"objective", "rollout", "mask_ratio_low", "mask_ratio_high", "seed"}
