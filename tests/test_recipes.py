"""The recipes that come with dmax: each is valid and continues what is there or can be made."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from transformers import TrainingArguments

from dmax.baselines.heads import KINDS
from dmax.models import LLaDA2MoeConfig
from dmax.recipe.sections import load_recipe
from dmax.tasks.word_problems import Numbers
from dmax.tiny import BUNDLED
from dmax.training.config import DMaxConfig

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.y*ml"))
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {
        "tiny_base_1",
        "tiny_base_2",
        "tiny_base_3",
        "tiny_oput_soft",
    }


@each_recipe
def test_it_parses(path: Path) -> None:
    assert load_recipe(path).output_dir.parent == Path("runs")


def test_no_two_write_to_the_same_place() -> None:
    places = [load_recipe(path).output_dir for path in RECIPES]
    assert len(set(places)) == len(places)


@each_recipe
def test_overrides_replace_fields_of_its_training(path: Path) -> None:
    recipe, unchanged = load_recipe(path, {"max_steps": 1}), load_recipe(path)
    if unchanged.head is not None:
        assert recipe.head == replace(unchanged.head, max_steps=1)
    else:
        assert recipe.training == {**unchanged.training, "max_steps": 1}


def test_there_is_one_for_every_kind_of_head() -> None:
    heads = {
        path.stem: recipe.head for path in RECIPES if (recipe := load_recipe(path)).head is not None
    }
    assert {name: head.kind for name, head in heads.items()} == {
        f"tiny_{kind}": kind for kind in KINDS
    }


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if "\nhead:" not in path.read_text(encoding="utf-8")],
    ids=lambda path: path.stem,
)
def test_its_training_is_one_that_the_trainer_takes(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    training = load_recipe(path).training
    arguments = DMaxConfig(output_dir=str(tmp_path), **training)
    for name, value in training.items():
        if isinstance(value, str):
            assert getattr(arguments, name) in (value, [], ["none"]), name
        else:  # YAML reads `5e-4` as a text and `5.0e-4` as a number
            assert getattr(arguments, name) == value, name


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if "\ntraining:" in path.read_text() and "tiny" in path.stem],
    ids=lambda path: path.stem,
)
def test_a_bundled_models_recipe_names_what_the_papers_defaults_would_change(path: Path) -> None:
    """They were run with transformers' defaults in these places, and stay what they were."""
    defaults = {entry.name: entry.default for entry in fields(TrainingArguments)}
    ours = {
        entry.name
        for entry in fields(DMaxConfig)
        if entry.name in defaults and entry.default != defaults[entry.name]
    }
    training = load_recipe(path).training
    assert training["max_steps"] > 0  # which makes `num_train_epochs` void
    before = {"num_train_epochs", "remove_unused_columns", "gradient_checkpointing"}
    assert ours - before - training.keys() == set()
    assert training["gradient_checkpointing"] is False


@each_recipe
def test_its_model_and_data_exist_or_can_be_made(path: Path) -> None:
    model, data = load_recipe(path).model, load_recipe(path).data
    Numbers(**data.numbers)
    if model.config is not None:
        known = LLaDA2MoeConfig(vocab_size=100).to_dict()
        assert not model.config.keys() - known.keys() - {"block_length"}
    else:
        assert model.path in {*BUNDLED, *(str(load_recipe(other).output_dir) for other in RECIPES)}
    if data.file is not None:  # the command that writes it stands beside it
        assert f"--output {data.file}" in path.read_text(encoding="utf-8")
