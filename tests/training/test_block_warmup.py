"""Blocks that grow while a model learns to decode them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_runs import killed_at
from test_trainer import losses, write_recipe

from dmax.errors import InputError
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training import objective_table
from dmax.training.block_warmup import block_length_at, check_stages
from dmax.training.objectives import ObjectiveModule

pytest.importorskip("accelerate")

STAGES = [[1, 2], [2, 1], [4, 1]]  # then the model's own 8


def test_the_last_stage_is_followed_by_the_models_own_length() -> None:
    assert [block_length_at(step, STAGES, 8) for step in range(6)] == [1, 1, 2, 4, 8, 8]
    assert [block_length_at(step, [], 8) for step in range(2)] == [8, 8]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (5, "pairs of a block length"),
        ([1, 4], "pairs of a block length"),
        ([[1]], "pairs of a block length"),
        ([[1, 2, 3]], "pairs of a block length"),
        ([[0, 2]], "pairs of a block length"),
        ([[1, 0]], "pairs of a block length"),
        ([[1.0, 2]], "pairs of a block length"),
        ([[True, 2]], "pairs of a block length"),
        ([["1", "2"]], "pairs of a block length"),
        ([[4, 1], [4, 1]], "got 4 after 4"),
        ([[4, 1], [1, 1]], "got 1 after 4"),
        ([[2, 1], [3, 1]], "got 3 after 2"),
    ],
)
def test_what_does_not_grow_by_whole_blocks_is_refused(stages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_stages(stages)


def test_the_models_own_length_is_the_last(tmp_path: Path) -> None:
    check_stages(STAGES, 8)
    for own in (4, 6):
        with pytest.raises(InputError, match=f"got {own} after 4"):
            check_stages(STAGES, own)
    path = write_recipe(tmp_path, training={"block_warmup": [[3, 1]]})
    with pytest.raises(InputError, match="got 8 after 3"):
        run_recipe(load_recipe(path))
    assert not (tmp_path / "out").exists()


def test_a_recipe_names_the_line_of_a_wrong_warmup(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, training={"block_warmup": [[2, 1], [3, 1]]})
    line = path.read_text().splitlines().index("  block_warmup:") + 1
    with pytest.raises(InputError, match=f"recipe.yaml:{line}: .*got 3 after 2"):
        load_recipe(path)


def test_a_loss_whose_block_length_changes_is_not_compiled(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, training={"block_warmup": [[1, 1]], "compile_objective": True})
    with pytest.raises(InputError, match="`compile_objective` does not go with `block_warmup`"):
        load_recipe(path)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int]]:
    """Block length and number of positions of every forward of an objective."""
    forward = ObjectiveModule.forward
    seen: list[tuple[int | None, int]] = []

    def spy(
        self: ObjectiveModule,
        generator: torch.Generator,
        block_length: int | None = None,
        **clean: Any,
    ) -> dict[str, torch.Tensor]:
        seen.append((block_length, clean["clean_ids"].shape[1]))
        return forward(self, generator, block_length, **clean)

    monkeypatch.setattr(ObjectiveModule, "forward", spy)
    return seen


@pytest.mark.parametrize("objective", sorted(objective_table().keys() - {"cforce"}))
def test_every_objective_warms_up(
    objective: str, tmp_path: Path, seen: list[tuple[int | None, int]]
) -> None:
    training = {
        "objective": objective,
        "block_warmup": STAGES,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
    }
    if objective == "mbd_oput":
        training |= {"mask_ratio_low": 0.2, "mask_ratio_high": 0.8}
    folder = run_recipe(load_recipe(write_recipe(tmp_path, training=training)))
    assert Counter(length for length, _ in seen) == {1: 4, 2: 2, 4: 2, 8: 2}  # two a step
    assert all(positions % 8 == 0 for _, positions in seen)
    assert json.loads((folder / "config.json").read_text())["block_length"] == 8
    assert all(math.isfinite(line["loss"]) for line in losses(tmp_path))


def test_a_stage_is_a_training_with_its_block_length(tmp_path: Path) -> None:
    small = tmp_path / "small"
    warm = tmp_path / "warm"
    for folder in (small, warm):
        folder.mkdir()
    training = {"objective": "mdlm", "max_steps": 2, "eos_labels": 8, "pad_to": 256}
    training["lr_scheduler_type"] = "constant"
    config = load_recipe(write_recipe(small)).model.config
    run_recipe(
        load_recipe(
            write_recipe(small, training=training, model={"config": config | {"block_length": 2}})
        )
    )
    training |= {"max_steps": 3, "block_warmup": [[2, 2]]}
    run_recipe(load_recipe(write_recipe(warm, training=training, model={"config": config})))
    assert losses(warm)[:2] == losses(small)
    assert losses(warm)[2]["loss_masked"] != losses(small)[1]["loss_masked"]


def test_a_killed_run_resumes_in_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"block_warmup": [[1, 2], [4, 2]], "save_steps": 1}
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run_recipe(load_recipe(write_recipe(whole, training=training)))
    path = write_recipe(broken, training=training)
    killed_at(3, monkeypatch, path)
    run_recipe(load_recipe(path))
    assert losses(broken) == losses(whole)
    weights = [load_file(folder / "out" / "model.safetensors") for folder in (whole, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_warmup_does_not_go_on_with_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, training={"block_warmup": [[1, 2]], "save_steps": 1})
    killed_at(2, monkeypatch, path)
    path = write_recipe(tmp_path, training={"block_warmup": [[1, 4]], "save_steps": 1})
    with pytest.raises(InputError, match="block_warmup"):
        run_recipe(load_recipe(path))


def test_held_out_loss_is_that_of_the_models_own_length(
    tmp_path: Path, seen: list[tuple[int | None, int]]
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "Jack has 3 mugs.", "response": "3"}\n')
    training = {
        "block_warmup": [[1, 5]],
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    data = {"problems": 16, "seed": 1, "eval_file": str(held_out)}
    run_recipe(load_recipe(write_recipe(tmp_path, training=training, data=data)))
    assert Counter(length for length, _ in seen) == {1: 5, 8: 1, None: 3}
