"""The recipes that come with dmax: each is valid and continues what is there or can be made."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from transformers import TrainingArguments

from dmax.baselines.heads import KINDS
from dmax.models import LLaDA2MoeConfig
from dmax.recipe.estimate import estimate
from dmax.recipe.estimate.cluster import Cluster
from dmax.recipe.sections import load_recipe
from dmax.tasks.word_problems import Numbers
from dmax.tiny import BUNDLED
from dmax.training.config import DMaxConfig

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.y*ml"))
HUB_MODELS = {"inclusionAI/LLaDA2.0-mini", "inclusionAI/LLaDA2.1-mini", "Zigeng/DMax-Math-16B"}
# Made by bench/pretrained.py and by `dmax convert`.
CONVERTED = {"runs/pretrained-ar", "runs/smollm2"}
HUB_DATA = {f"Zigeng/DMax-LLaDA-2.0-Mini-{kind}-Trajectories" for kind in ("Math", "Code")}
PAPER = [
    path
    for path in RECIPES
    if path.stem.endswith(("_math", "_code")) and "objective: oput" in path.read_text()
]
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
        if value == "auto":
            assert isinstance(getattr(arguments, name), bool), name
        elif isinstance(value, str):
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
    before |= {"ddp_find_unused_parameters"}  # they ran in one process
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
        made = {str(load_recipe(other).output_dir) for other in RECIPES}
        converted = re.findall(r"dmax convert \S+ -o (\S+)", path.read_text(encoding="utf-8"))
        assert model.path in {*BUNDLED, *made, *HUB_MODELS, *CONVERTED, *converted}
    assert data.hub in {None, *HUB_DATA}
    if data.file is not None:  # the command that writes it stands beside it
        text = path.read_text(encoding="utf-8")
        stage = data.file.removeprefix("runs/pretrained_").removesuffix(".jsonl")
        made_by_stage = f"file: {data.file}           # python bench/pretrained.py {stage}"
        assert f"--output {data.file}" in text or made_by_stage in text


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipes_have_the_papers_values(path: Path) -> None:
    """Those of the published configuration (section 3 of the paper's training recipe)."""
    recipe = load_recipe(path)
    assert (
        recipe.training.items()
        >= {
            "objective": "oput",
            "rollout": "argmax",
            "mask_ratio_low": 0.75,
            "mask_ratio_high": 0.75,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 2e-6,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "weight_decay": 0.01,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "max_grad_norm": 1.0,
            "gradient_checkpointing": True,
        }.items()
    )
    assert (recipe.data.max_length, recipe.data.too_long) == (2048, "truncate")
    assert recipe.model.dtype == "float32"
    assert recipe.fsdp is not None
    assert "torchrun --nproc_per_node 8 " in path.read_text(encoding="utf-8")  # a step takes 8


LARGE = [path for path in RECIPES if load_recipe(path).model.path in HUB_MODELS]


@pytest.mark.slow
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_recipe_for_gpus_says_what_its_dry_run_says_and_that_it_has_not_run(path: Path) -> None:
    pytest.importorskip("accelerate")
    text = path.read_text(encoding="utf-8")
    gpus, gpu, examples = re.findall(
        r"dmax train --dry-run --gpus (\d+) --gpu (\w+) --examples (\d+) ", text
    )[0]
    recipe = load_recipe(path, {"use_cpu": True}, elsewhere=True)
    found = estimate(recipe, Cluster.of(int(gpus), gpu), examples=int(examples))
    assert found.fits and found.run.hours
    is_short = found.run.hours[1] < 1
    times = [60 * each if is_short else each for each in found.run.hours]
    span = " to ".join(dict.fromkeys(f"{each:.0f}" for each in times))
    unit = "minutes" if is_short else "hours"
    assert f"{found.peak / 1e9:.0f} GB on each GPU, {span} {unit}" in text
    assert "has not been run on a GPU" in text.replace("\n# ", " ")
