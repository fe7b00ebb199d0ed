"""bench/noise.py: what its records began with is held against what is asked for, and its gaps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import ablation_training  # noqa: E402
import noise  # noqa: E402
import noise_findings  # noqa: E402
import noise_options  # noqa: E402
import noise_page  # noqa: E402
import noise_plan  # noqa: E402
from noise_points import Points  # noqa: E402

from dmax.errors import InputError  # noqa: E402
from dmax.recipe.sections import Recipe, load_recipe  # noqa: E402

ROOT = Path(noise.__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
DESIGN = noise_plan.DESIGNS[noise_plan.BUNDLED]
RUN = noise_plan.Run("sampled", 8e-4, 1)


@pytest.fixture
def recipe(noise_recipe: Path) -> Recipe:
    return load_recipe(noise_recipe)


def study(recipe: Recipe, folder: Path, **changes: Any) -> noise.Study:
    given = {"task": "word_problems", "held_out": 4, "limit": 200} | changes
    return noise.Study(recipe, folder / "runs", folder, "noise", **given)


def on(recipe: Recipe, base: str) -> Recipe:
    """The recipe, with another base."""
    return replace(recipe, model=replace(recipe.model, path=base))


def digests(path: Path) -> set[str]:
    return {p["weights"] for p in json.loads(path.read_text())["points"] if p["label"] == "base"}


# --- another study than the record's --------------------------------------------------------------


def test_a_record_of_another_base_is_left_as_it_is(recipe: Recipe, tmp_path: Path) -> None:
    held = (RESULTS / "noise.json").read_bytes()
    (tmp_path / "noise.json").write_bytes(held)
    with pytest.raises(InputError, match="differs in the weights of the base") as told:
        study(on(recipe, "tiny-dmax"), tmp_path).run([(RUN, 25)])
    assert str(tmp_path / "noise.json") in str(told.value) and "--output" in str(told.value)
    assert (tmp_path / "noise.json").read_bytes() == held
    assert not (tmp_path / "noise_tokens.json").exists()


def test_the_committed_record_is_gone_on_with_in_whatever_dtype(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base was decoded in bfloat16, and this machine may decode in float32."""
    for name in ("noise.json", "noise_tokens.json"):
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    monkeypatch.setattr(noise, "sweep", lambda *_, **__: pytest.fail("measured again"))
    study(recipe, tmp_path).run([(RUN, 25)])
    for name in ("noise.json", "noise_tokens.json"):
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_examples": 6}, "`num_examples`"),
        ({"held_out": 3}, "`held_out`"),
        ({"limit": 5}, "limit"),
    ],
)
def test_a_record_says_what_it_was_made_with(
    changes: dict[str, int], name: str, recipe: Recipe, tmp_path: Path
) -> None:
    first = study(recipe, tmp_path)
    first.points.write_text(json.dumps({"limit": 200, "points": []}))
    first.looks.write_text(json.dumps(first._looks()))
    study(recipe, tmp_path).check()
    for others in (recipe, replace(recipe, training=recipe.training | {"use_cpu": False})):
        study(others, tmp_path).check()
    with pytest.raises(InputError, match=f"a study that differs in {name}\n"):
        study(recipe, tmp_path, **changes).check()
    other_data = Path(recipe.data.file or "")
    other_data.write_text(other_data.read_text().replace("a", "b"))
    changed = replace(recipe, training=recipe.training | {"weight_decay": 0.5})
    with pytest.raises(InputError, match="differs in `data`, `training.weight_decay`"):
        study(changed, tmp_path).check()


def test_how_many_examples_a_run_has_learnt_is_one_of_its_settings(
    recipe: Recipe, tmp_path: Path
) -> None:
    def settings(most: int | None) -> dict[str, Any]:
        made = study(recipe, tmp_path, num_examples=most)
        return made._settings(RUN, made._training(RUN, 25))

    assert settings(6) != settings(8)
    assert "num_examples" not in settings(None), "runs from before have no such entry"


def test_more_held_out_than_there_is_is_refused_before_anything_is_written(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="of 12 examples, 12 held out leave none to learn from"):
        study(recipe, tmp_path / "new", held_out=12).run([(RUN, 25)])
    assert not (tmp_path / "new").exists()


# --- training -------------------------------------------------------------------------------------


def test_a_run_in_stages_has_the_weights_of_a_run_in_one(recipe: Recipe, tmp_path: Path) -> None:
    small = replace(recipe, training=recipe.training | {"per_device_train_batch_size": 2})
    run = noise_plan.Run("at-errors", 8e-4, 1)

    def weights(folder: str, stages: tuple[int, ...]) -> bytes:
        made = study(small, tmp_path / folder)
        for steps in stages:
            checkpoint = made.train(run, steps)
        assert checkpoint.name == f"checkpoint-{stages[-1]}"
        return (checkpoint / "model.safetensors").read_bytes()

    in_stages = weights("stages", (1, 3))
    assert in_stages == weights("one", (3,))
    assert in_stages != weights("one", (4,))


def test_a_run_that_stands_past_a_stage_is_said_to_be_trained_anew(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = study(recipe, tmp_path)
    last = made.runs / RUN.name / "checkpoint-400"
    last.mkdir(parents=True)

    class Stopped(Exception):
        """In place of a training."""

    def stop(*_: Any) -> None:
        raise Stopped

    def run_folder(*_: Any) -> argparse.Namespace:
        found = last if last.exists() else None
        return argparse.Namespace(find_checkpoint=lambda report: None, last_checkpoint=found)

    monkeypatch.setattr(noise, "RunFolder", run_folder)
    monkeypatch.setattr(noise, "make_arguments", stop)
    with pytest.raises(Stopped):
        made.train(RUN, 25)
    assert not last.exists()
    said, begun = capsys.readouterr().out.splitlines()
    assert said == f"{last} is past 25 steps: training {RUN.name} anew"
    assert begun == f"training {RUN.label(25)}"


def test_a_study_takes_as_many_examples_as_its_design_says(recipe: Recipe, tmp_path: Path) -> None:
    every, eight, most = (
        list(study(recipe, tmp_path, num_examples=number).examples) for number in (None, 8, 320)
    )
    assert len(every) == 12
    assert eight == every[:8]
    assert most == every


# --- the command ----------------------------------------------------------------------------------


def test_a_page_without_a_record_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    said = refusal("noise", "--page", "--output", str(tmp_path))
    assert f"{tmp_path / 'noise.json'} is not there yet" in said
    assert "run `python bench/noise.py`" in said


def test_what_is_given_twice_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--seeds", "2", "1", "2", "--steps", "25", "25"]
    monkeypatch.setattr("sys.argv", ["noise.py", *given])
    options = noise_options.parse("")
    assert (options.seeds, options.steps) == ([2, 1], [25])


def test_answers_that_were_cut_off_are_gone_on_with(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    monkeypatch.setattr(ablation_training, "LLM", lambda *_, **__: None)
    monkeypatch.setattr(ablation_training, "ModelAnswerer", lambda *_: None)
    monkeypatch.setattr(
        ablation_training, "distill", lambda answerer, prompts, files: asked.append(len(prompts))
    )
    options = argparse.Namespace(recipe=DESIGN.recipe, design=DESIGN)
    noise.make_ready(recipe, options)
    assert asked == [5000]
    data = Path(recipe.data.file or "")
    data.write_text("{}\n" * 4990)
    data.with_suffix(".dropped.jsonl").write_text("{}\n" * 10)
    noise.make_ready(recipe, options)
    assert asked == [5000]


# --- pages of what is there -----------------------------------------------------------------------


def committed(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / name).read_text()))


@pytest.mark.parametrize("looks", [(), ("base, mask ratio 0.25",)])
def test_what_was_not_looked_at_is_left_out(looks: tuple[str, ...], tmp_path: Path) -> None:
    records = tmp_path / "noise.json", tmp_path / "noise_tokens.json"
    records[0].write_bytes((RESULTS / "noise.json").read_bytes())
    if looks:
        held = committed("noise_tokens.json")
        held["looks"] = {name: held["looks"][name] for name in looks}
        records[1].write_text(json.dumps(held))
    noise_page.write_page(*records, DESIGN)
    page = (tmp_path / "noise.md").read_text()
    assert "The untrained base mends" not in page and "The base gives at least 1 %" not in page
    assert ("(d) Of masked positions" in page) == bool(looks)
    assert ("(d) The base has not been looked at yet." in page) != bool(looks)


def test_models_that_are_never_wrong_are_not_compared() -> None:
    points = Points(committed("noise.json"), [])
    looks = committed("noise_tokens.json")["looks"]
    told = noise_findings.recognition(points, looks)
    label = next(name for name in looks if name.startswith("sampled"))
    looks[label]["argmax"] |= {"wrong": 0, "mended": 0, "right": 0, "broken": 0}
    fewer = noise_findings.recognition(points, looks)
    number = int(told.partition(" comparisons")[0].rpartition(" ")[2])
    assert f" of {number - 1} comparisons" in fewer


@pytest.mark.parametrize("gone", ["at-errors", "same-kind"])
def test_one_control_alone_tells_nothing(gone: str) -> None:
    record = committed("noise.json")
    record["points"] = [p for p in record["points"] if not p["label"].startswith(gone)]
    assert noise_findings.consequence(Points(record, [])) == (
        "The number of wrong tokens is told from which they are once both are measured."
    )
