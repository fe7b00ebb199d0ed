"""`lora` in a recipe: runs that train, stop, go on and merge; and held-out loss from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from two_ranks import launch

from dmax import LLM
from dmax.checkpoint import load_checkpoint
from dmax.errors import InputError
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.trainer import DMaxTrainer

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("datasets")


def write_recipe(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    training = {
        "max_steps": 4,
        "save_steps": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    recipe = {
        "output_dir": str(folder / "out"),
        "model": {"path": "tiny-base", "experts_implementation": "dense_mm"},
        "data": {"problems": 8, "seed": 1},
        "lora": {"r": 4, "alpha": 8, "targets": ["attention", "experts"]},
        "training": training | changes.pop("training", {}),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


def run(path: Path) -> Path:
    return run_recipe(load_recipe(path))


def history(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((folder / "out-run" / "checkpoint-4" / "trainer_state.json").read_text())
    varying = ("tokens_per_second", "_runtime", "_per_second", "preparation_time")
    return [
        {key: value for key, value in line.items() if not key.endswith(varying)}
        for line in state["log_history"]
    ]


def load(folder: Path) -> Any:
    return load_checkpoint(folder, dtype=torch.float32, device="cpu")


def test_a_stopped_run_goes_on_to_the_same_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(write_recipe(tmp_path / "whole"))
    assert json.loads((whole / "adapter_config.json").read_text())["r"] == 4
    assert not (whole / "model.safetensors").exists()
    assert not (whole / "README.md").exists()

    class StoppedError(Exception):
        pass

    training_step = DMaxTrainer.training_step

    def stops(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise StoppedError
        return training_step(self, *args, **kwargs)

    path = write_recipe(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(DMaxTrainer, "training_step", stops)
        with pytest.raises(StoppedError):
            run(path)
    again = run(path)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_merged_at_the_end_or_later(tmp_path: Path) -> None:
    lora = {"r": 4, "alpha": 8}
    adapters = run(write_recipe(tmp_path / "one", lora=lora))
    at_once = run(write_recipe(tmp_path / "two", lora={**lora, "merge": True}))
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        expected = load(adapters).model(input_ids=ids).logits
        found = load(at_once).model(input_ids=ids).logits
        base = load_checkpoint("tiny-base", dtype=torch.float32, device="cpu")
        before = base.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (found - before).abs().max() > 0.01
    assert not (at_once / "adapter_config.json").exists()
    assert LLM(str(at_once), device="cpu").checkpoint.decoding == "spd"

    later = run(write_recipe(tmp_path / "one", lora={**lora, "merge": True}))
    assert not (later / "adapter_config.json").exists()
    one, other = (load_file(folder / "model.safetensors") for folder in (later, at_once))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name].to(one[name].dtype), atol=2e-2, rtol=0)
    assert json.loads((later / "dmax.json").read_text())["steps"] == 4
    run(write_recipe(tmp_path / "one", lora={**lora, "merge": True}))  # there is nothing left to do


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 4}}, r"recipe.yaml:\d+: unknown key `lora.rank`"),
        ({"lora": {"r": 0}}, "in `lora`, `r` must be a whole number"),
        ({"lora": {"r": "many"}}, "`lora.r` must be int"),
        ({"lora": {"dropout": 2.0}}, "`dropout` must be a number between 0 and 1"),
        ({"lora": {"targets": []}}, "`targets` must be a list of names"),
        ({"lora": {"targets": [4]}}, "`targets` must be a list of names"),
        ({"lora": {"targets": ["experts"], "dropout": 0.1}}, "take no `dropout`"),
        ({"lora": {"targets": ["nowhere"]}}, "do not go with the model"),
        ({"lora": None}, "`lora` must be a mapping"),
        (
            {"model": {"path": "tiny-base", "keep_start": 0.5}},
            r"recipe.yaml:\d+: `model.keep_start` and `lora` do not go together",
        ),
        ({"training": {"router_bias_speed": 0.1}}, "`training.router_bias_speed` and `lora`"),
        ({"fsdp": {}}, "together|processes"),
        ({"model": {"config": {"hidden_size": 16}}}, "adapters need a model to adapt"),
        ({"head": {"kind": "demask"}, "training": {}}, "a recipe with `head` has no"),
        ({"training": {"model_init_kwargs": {}}}, "would not do here what it says"),
    ],
)
def test_what_does_not_go_with_adapters_is_named_by_its_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(write_recipe(tmp_path / "recipe", **changes))


def test_adapters_are_no_base_of_others(tmp_path: Path) -> None:
    first = run(write_recipe(tmp_path / "first", training={"max_steps": 1}))
    with pytest.raises(InputError, match=r"in `model.path`, .* cannot be the base of others"):
        run(write_recipe(tmp_path / "second", model={"path": str(first)}))


def test_without_peft_a_recipe_says_so_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("dmax.extras.find_spec", lambda name: None if name == "peft" else name)
    with pytest.raises(InputError, match="needs the package `peft`"):
        run(write_recipe(tmp_path / "recipe"))
    assert not (tmp_path / "recipe" / "out-run").exists()


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one_that_accumulates(tmp_path: Path) -> None:
    training = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    in_one = {"gradient_accumulation_steps": 2, **training}
    one = run(write_recipe(tmp_path / "one", training=in_one))
    two = write_recipe(tmp_path / "two", training=training)
    done = launch("-m", "dmax", "train", two)
    assert done.returncode == 0, done.stdout
    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "two/out", one)
    )
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_held_out_records_give_a_loss_beside_accuracy(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    lines = [{"prompt": f"Tom has {n} mugs.", "response": f"{n}"} for n in range(3, 6)]
    held_out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_recipe(
        tmp_path / "run",
        data={"problems": 8, "eval_file": str(held_out)},
        training={"eval_strategy": "steps", "eval_steps": 2},
        eval={"limit": 1, "decoding": {"max_new_tokens": 32}},
    )
    run(path)
    lines = [line for line in history(tmp_path / "run") if "eval_loss" in line]
    assert len(lines) == 2
    assert lines[0]["eval_loss"] != lines[1]["eval_loss"]
    assert {"eval_loss_masked", "eval_rollout_error", "eval_accuracy", "eval_tpf"} <= set(lines[0])


def test_a_held_out_file_is_looked_for_before_a_model_is_loaded(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path / "run",
        model={"path": "tiny-base"},
        data={"problems": 8, "eval_file": "nowhere.jsonl"},
        training={"eval_strategy": "steps", "eval_steps": 2},
    )
    with pytest.raises(InputError, match=r"nowhere.jsonl"):
        run(path)
