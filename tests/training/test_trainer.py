"""The trainer: resumed runs repeat whole ones, bad recipes and data are named, losses logged."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments

from dmax.errors import InputError
from dmax.recipe.run import blend_weights, run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training import objective_table
from dmax.training.clean_stream import CleanBatch
from dmax.training.config import DMaxConfig
from dmax.training.objectives import OPUT, Loss
from dmax.training.start import check_call

pytest.importorskip("accelerate")

CONFIG = {
    "block_length": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 512,
}


def write_recipe(folder: Path, **changes: Any) -> Path:
    training = {
        "objective": "oput",
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_steps": 3,
        "router_bias_speed": 0.01,
        "use_cpu": True,
        "seed": 3,
        "report_to": "none",
        "disable_tqdm": True,
    }
    recipe = {
        "output_dir": str(folder / "out"),
        "model": {"config": CONFIG, "experts_implementation": "dense_mm"},
        "data": {"problems": 16, "seed": 1},
        "training": training | changes.pop("training", {}),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


def losses(folder: Path) -> list[dict[str, float]]:
    checkpoints = sorted(
        (folder / "out-run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    return [
        {
            key: value
            for key, value in line.items()
            if key.startswith(("loss", "rollout", "step", "entropy", "reward", "mmd", "median"))
        }
        for line in state["log_history"]
    ]


@pytest.mark.parametrize(
    "noise",
    [
        {"rollout": "soft"},
        {"rollout": "sample"},
        {"objective": "mbd_oput", "mask_ratio_low": 0.2, "mask_ratio_high": 0.8},
        {"objective": "mmd", "mmd_groups": 2, "mmd_bandwidth": 0.1},
    ],
    ids=["soft", "sample", "mbd_oput", "mmd"],
)
def test_a_killed_run_resumes_on_the_same_losses(
    tmp_path: Path, noise: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `mmd`, rewards are equal only if its frozen copy is of the weights of the start."""
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run_recipe(load_recipe(write_recipe(whole, training=noise)))

    class KilledError(Exception):
        pass

    from dmax.training.trainer import DMaxTrainer

    compute_loss = DMaxTrainer.compute_loss

    def dies_in_step_five(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise KilledError
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DMaxTrainer, "compute_loss", dies_in_step_five)
        with pytest.raises(KilledError):
            run_recipe(load_recipe(write_recipe(broken, training=noise)))
    run_recipe(load_recipe(broken / "recipe.yaml"))
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == 6


@pytest.mark.parametrize("objective", [name for name in objective_table() if name != "cforce"])
def test_every_objective_trains_and_reports(tmp_path: Path, objective: str) -> None:
    training: dict[str, Any] = {"objective": objective}
    if objective == "mbd_oput":
        training |= {"mask_ratio_low": 0.2, "mask_ratio_high": 0.8}
    folder = run_recipe(load_recipe(write_recipe(tmp_path, training=training)))
    assert (folder / "model.safetensors").is_file()
    first = losses(tmp_path)[0]
    last = losses(tmp_path)[-1]
    if objective != "mmd":  # whose loss is about 0 all the time
        # The others may rise with what is right at first.
        assert last["loss_masked"] < first["loss_masked"]
    expected = {
        "mmd": {"reward_masked", "mmd_masked", "mmd_predicted", "median_bandwidth"},
        "mdlm": {"loss_masked"},
        "d2f": {"loss_masked"},
        "dparallel": {"loss_masked", "entropy_right"},
        "uniform": {"loss_masked", "loss_random"},
    }
    parts = expected.get(objective, {"loss_masked", "loss_predicted", "rollout_error"})
    assert parts <= set(first)


def test_what_is_saved_may_keep_a_share_of_the_start(tmp_path: Path) -> None:
    start = run_recipe(load_recipe(write_recipe(tmp_path)))
    (tmp_path / "next").mkdir()
    model = {"path": str(start), "keep_start": 1.0}
    end = run_recipe(
        load_recipe(write_recipe(tmp_path / "next", model=model, training={"max_steps": 3}))
    )
    torch.testing.assert_close(
        load_file(end / "model.safetensors"), load_file(start / "model.safetensors")
    )


def test_weights_are_blended_by_the_share() -> None:
    one = torch.nn.Linear(2, 1)
    other = torch.nn.Linear(2, 1)
    expected = {k: 0.75 * v + 0.25 * other.state_dict()[k] for k, v in one.state_dict().items()}
    blend_weights(one, other.state_dict(), 0.25)
    torch.testing.assert_close(dict(one.state_dict()), expected)


def test_training_moves_the_expert_bias(tmp_path: Path) -> None:
    from dmax.checkpoint import load_checkpoint

    folder = run_recipe(load_recipe(write_recipe(tmp_path)))
    model: Any = load_checkpoint(folder, dtype=torch.float32, device="cpu").model
    assert model.model.layers[1].mlp.gate.expert_bias.abs().max() > 0


@pytest.mark.parametrize("lora", [{}, {"lora": {"r": 2, "dropout": 0.5, "targets": ["attention"]}}])
def test_an_evaluation_leaves_the_weights_as_they_are(tmp_path: Path, lora: dict[str, Any]) -> None:
    """Held-out tokens are no part of an expert's load, and draw nothing that training draws."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "How many?", "response": "They have 7 mugs."}\n')
    data = {"problems": 16, "seed": 1}
    decoded = {"limit": 1, "decoding": {"max_new_tokens": 8}}
    often = {"eval_strategy": "steps", "eval_steps": 1}
    start = tmp_path / "start"
    start.mkdir()
    model = {"path": str(run_recipe(load_recipe(write_recipe(start, training={"max_steps": 1}))))}
    weights = []
    for name, changes in {
        "plain": {"data": data, "training": {}},
        "evaluated": {
            "data": data | {"eval_file": str(held_out)},
            "eval": decoded,
            "training": often,
        },
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        if lora:
            changes["training"]["router_bias_speed"] = 0.0
        out = run_recipe(load_recipe(write_recipe(folder, model=model, **lora, **changes)))
        [file] = out.glob("*.safetensors")
        weights.append(load_file(file))
    assert not lora or all("lora" in name for name in weights[0])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_one_process_trains_on_one_of_several_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would wrap the model in `DataParallel`, which the objectives cannot call."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    changes = {
        "max_steps": 1,
        "save_steps": 1,
        "use_cpu": False,
        "dataloader_pin_memory": False,  # there may be no GPU at all
    }
    folder = run_recipe(load_recipe(write_recipe(tmp_path, training=changes)))
    assert (folder / "model.safetensors").is_file()
    config = DMaxConfig(output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=3)
    assert config.n_gpu == 1
    assert config.train_batch_size == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr_scheduler_type": "cosin"},
        {"optim": 5},
        {"accelerator_config": "missing.json"},
        {"lr_scheduler_kwargs": "{"},
        {"objective": ["oput"]},
        {"metric_for_best_model": 5},
    ],
    ids=str,
)
def test_arguments_that_a_library_refuses(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="training arguments are not usable|`objective` must be"):
        DMaxConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_evaluation_hook_reports_accuracy_and_tpf(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        training={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        eval={"limit": 2, "decoding": {"strategy": "spd", "threshold": 0.5, "max_new_tokens": 16}},
    )
    run_recipe(load_recipe(recipe))
    state = json.loads((tmp_path / "out-run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert any({"eval_accuracy", "eval_tpf"} <= set(line) for line in state["log_history"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainig": {}}, r"recipe.yaml:\d+: unknown key `trainig`"),
        (
            {"training": {"lerning_rate": 1}},
            r"recipe.yaml:\d+: unknown key `training.lerning_rate`",
        ),
        ({"training": {"objective": "opud"}}, "`objective` must be one of mdlm, uniform, oput"),
        (
            {"training": {"learning_rate": -1.0}},
            "`learning_rate` must be a number between 0 and .*, got -1.0",
        ),
        (
            {"training": {"per_device_train_batch_size": 0}},
            "`per_device_train_batch_size` must be a whole number between 1 and .*, got 0",
        ),
        (
            {"training": {"rollout_temperature": 0.0}},
            "`rollout_temperature` must be a number above 0 .*, got 0.0",
        ),
        (
            {"training": {"certainty_temperature": -1.0}},
            "`certainty_temperature` must be a number above 0 .*, got -1.0",
        ),
        (
            {"training": {"eos_labels": -3}},
            "`eos_labels` must be a whole number between 0 and .*, got -3",
        ),
        ({"training": {"pad_to": 0}}, "`pad_to` must be a whole number between 1 and .*, got 0"),
        ({"training": {"mask_ratio_low": 0.9, "mask_ratio_high": 0.5}}, "mask ratios"),
        ({"model": {}}, r"recipe.yaml:\d+: `model` needs exactly one of"),
        (
            {"model": {"path": "tiny-base", "keep_start": 2.0}},
            r"recipe.yaml:\d+: `model.keep_start` must be a share",
        ),
        (
            {"model": {"config": CONFIG, "keep_start": 0.5}},
            "`model.keep_start` must be a share .* at `model.path`",
        ),
        ({"data": {}}, r"recipe.yaml:\d+: `data` needs exactly one of"),
        ({"eval": {"decoding": {"threshold": 2}}}, "`threshold` must be a number between 0 and 1"),
        ({"data": {"file": "nowhere.jsonl"}}, "nowhere.jsonl` is not a file"),
    ],
)
def test_a_bad_recipe_is_one_clear_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_recipe(load_recipe(write_recipe(tmp_path, **change)))


def test_a1_a6_the_defaults_are_argmax_rollouts_at_a_fixed_mask_ratio(tmp_path: Path) -> None:
    config = DMaxConfig(output_dir=str(tmp_path), report_to="none")
    assert (config.objective, config.rollout) == ("oput", "argmax")
    assert config.mask_ratio_low == config.mask_ratio_high == 0.75


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    """The paper's section 4.1 and its published configuration (docs/paper_index.md)."""
    config = DMaxConfig(output_dir=str(tmp_path))
    assert config.num_train_epochs == 2
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8
    assert config.learning_rate == 2e-6
    assert config.lr_scheduler_type == "cosine"
    assert config.get_warmup_steps(1000) == 30
    assert config.weight_decay == 0.01
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.999)
    assert config.max_grad_norm == 1.0
    assert config.gradient_checkpointing
    assert config.eos_labels is None  # one block


@pytest.mark.parametrize(
    ("changes", "gpu_has_it", "expected"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"bf16": False}, True, False),
        ({"fp16": True}, True, False),
        ({"use_cpu": True}, True, False),
        ({"use_cpu": True, "bf16": True}, False, True),
    ],
)
def test_a_gpu_computes_in_bfloat16_by_default_and_a_cpu_does_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    gpu_has_it: bool,
    expected: bool,
) -> None:
    # A machine with a GPU, whose processor emulates bfloat16.
    monkeypatch.setattr(
        "dmax.training.config.select_device",
        lambda device: torch.device("cuda" if device == "auto" else device),
    )
    monkeypatch.setattr(
        "dmax.training.config.has_bfloat16", lambda device: device.type == "cuda" and gpu_has_it
    )
    monkeypatch.setattr(
        "transformers.training_args.is_torch_bf16_gpu_available", lambda: gpu_has_it
    )
    assert DMaxConfig(output_dir=str(tmp_path), **changes).bf16 is expected


@pytest.mark.parametrize(
    ("asked", "cpu_has_it", "expected"),
    [("auto", True, True), ("auto", False, False), (True, True, True), (True, False, True)],
)
def test_a_cpu_computes_in_bfloat16_where_it_can_and_is_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: bool | str,
    cpu_has_it: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr("dmax.environment._cpu_has_bfloat16", lambda: cpu_has_it)
    config = DMaxConfig(output_dir=str(tmp_path), use_cpu=True, bf16=asked)
    assert config.bf16 is expected
    assert not caplog.text  # a recipe's arguments are tried before they are used
    check_call(config, {})
    assert ("emulates bfloat16" in caplog.text) is (expected and not cpu_has_it)


@pytest.mark.parametrize("cpu_has_it", [True, False])
def test_auto_needs_no_use_cpu_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_has_it: bool
) -> None:
    monkeypatch.setattr("dmax.environment._cpu_has_bfloat16", lambda: cpu_has_it)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = DMaxConfig(output_dir=str(tmp_path), bf16="auto")
    assert (config.device.type, config.bf16) == ("cpu", cpu_has_it)


def test_auto_leaves_fp16_alone_and_other_words_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmax.environment._cpu_has_bfloat16", lambda: True)
    config = DMaxConfig(output_dir=str(tmp_path), use_cpu=True, fp16=True, bf16="auto")
    assert (config.fp16, config.bf16) == (True, False)
    with pytest.raises(InputError, match="`bf16` must be true, false or auto, got 'yes'"):
        DMaxConfig(output_dir=str(tmp_path), bf16="yes")


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_turned_off_by_either_of_its_names(tmp_path: Path, name: str) -> None:
    if name not in {entry.name for entry in fields(TrainingArguments)}:
        pytest.skip("this transformers knows one name only")
    config = DMaxConfig(output_dir=str(tmp_path), **{name: False})
    assert config.gradient_checkpointing is False
    assert getattr(config, "activation_checkpointing", False) is False


def test_an_objective_knows_how_much_of_the_training_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    loss = OPUT.loss

    def note(self: OPUT, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        seen.append(clean.progress)
        return loss(self, model, clean, generator)

    monkeypatch.setattr(OPUT, "loss", note)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "one", "response": "two"}\n')
    training = {"max_steps": 4, "gradient_accumulation_steps": 2}
    data = {"problems": 16, "seed": 1, "eval_file": str(held_out)}
    evaluates = {"eval_strategy": "steps", "eval_steps": 2}
    run_recipe(load_recipe(write_recipe(tmp_path, training=training | evaluates, data=data)))
    # Evaluations are all alike, so that their losses can be compared.
    assert seen == [0, 0, 0.25, 0.25, 1, 0.5, 0.5, 0.75, 0.75, 1]


def test_micro_batches_of_a_step_are_averaged(tmp_path: Path) -> None:
    """Trainer adds them up for models that take `**kwargs` unless it is told not to."""
    first = {}
    for size, steps in ((4, 1), (1, 4)):
        folder = tmp_path / str(steps)
        folder.mkdir()
        changes = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_steps": 1,
        }
        changes |= {
            "objective": "mdlm",
            "mask_ratio_low": 1.0,
            "mask_ratio_high": 1.0,
            "save_steps": 1,
        }
        run_recipe(load_recipe(write_recipe(folder, training=changes)))
        first[steps] = losses(folder)[0]
    assert first[4]["loss"] == pytest.approx(
        first[1]["loss"], rel=0.02
    )  # answers differ in length, so not exactly
    assert first[4]["loss_masked"] == pytest.approx(first[4]["loss"], rel=1e-3)
