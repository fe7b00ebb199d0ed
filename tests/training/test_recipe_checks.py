"""A recipe is checked whole, and within bounds, before a model is loaded or a folder is made."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_trainer import CONFIG, write_recipe

from dmax.errors import InputError
from dmax.recipe import build
from dmax.recipe.file import MAX_BYTES, read_recipe_file
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file gets as far as a model."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    for name in ("load_checkpoint", "new_checkpoint"):
        monkeypatch.setattr(build, name, forbidden)


def refused(path: Path, message: str) -> InputError:
    """Both steps of the command end in one sentence, and nothing is left behind."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        run_recipe(load_recipe(path))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    assert sorted(path.parent.rglob("*")) == before
    return caught.value


# --- YAML -----------------------------------------------------------------------------------------


def laughs(opening: str, item: str) -> str:
    """Nine levels of aliases, each of which stands for nine of the level before it."""
    names = "bcdefghij"
    levels = zip("a" + names, names, strict=False)
    return f"a: &a {opening}\n" + "".join(
        f"{name}: &{name} {item.format(*[f'*{before}'] * 9)}\n" for before, name in levels
    )


LIST = "[{}, {}, {}, {}, {}, {}, {}, {}, {}]"
MAPPING = "{{a: {}, b: {}, c: {}, d: {}, e: {}, f: {}, g: {}, h: {}, i: {}}}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (laughs("[x]", LIST), "1: more than 2,000 values"),
        (laughs("{x: 1}", MAPPING), "more than 2,000 values"),
        (laughs("{x: 1}", f"{{{{<<: {LIST}}}}}"), "more than 2,000 values"),
        ("a: &a [*a]", "1: nested more than 20 deep"),
        ("a:\n  b: &b {c: {d: *b}}", "2: nested more than 20 deep"),
        ("a: " + "[" * 25_000, r"1: not valid YAML \(RecursionError\)"),
        ("a: " + "{a: " * 7_000, r"1: not valid YAML \(RecursionError\)"),
        ("".join(" " * depth + "a:\n" for depth in range(200)), "nested more than 20 deep"),
        ("a: [" + "1, " * 9_000 + "]", "1: more than 2,000 values"),
        ("".join(f"k{index}: 1\n" for index in range(3_000)), "2001: more than 2,000 values"),
        ("a: !!python/object/apply:os.system ['true']", "1: a value is of YAML's kind os.system"),
        ("a: !secret b", "1: a value is of YAML's kind !secret"),
        ("a: !!binary aGk=", "1: a value is of YAML's kind binary"),
        ("a: {b: !!set {c}}", "1: a value is of YAML's kind set"),
        ("a: 2026-01-01", "1: a value is of YAML's kind timestamp"),
        ("2026-01-01: a", "1: a key must be a word, got '2026-01-01', YAML's timestamp"),
        ("a: 1\n1: a", "2: a key must be a word, got '1', YAML's int"),
        ("~: a", "1: a key must be a word"),
        ("yes: a", "1: a key must be a word"),
        ("? [a]\n: b", "1: a key must be a word, got YAML's seq"),
        ("a:\n  - b: 1\n    b: 2", r"3: the key `a\[0\]\.b` stands in line 2 already"),
        ('a: "\\ud800"', "1: a text holds a NUL or half of a surrogate pair"),
        ('"\\udc00": a', "1: a text holds a NUL or half of a surrogate pair"),
        ('a:\n  b: "x\\0"', "2: a text holds a NUL"),
        ("a:\n  b: .inf", "2: `a.b` must be a finite number, got inf"),
        ("a:\n  - 1\n  - -.inf", r"3: `a\[1\]` must be a finite number, got -inf"),
        ("a: .nan", "1: `a` must be a finite number, got nan"),
        ("a: " + "9" * 50, "1: `a` must be a number of up to 64 bits"),
        ("a: 0x" + "f" * 20_000, "1: `a` must be a number of up to 64 bits"),
        ("a: " + "9" * 5_000, r"1: not valid YAML \(ValueError\)"),
        ("a: !!int b", r"1: not valid YAML \(ValueError\)"),
        ("a: *b", r"1: not valid YAML \(ComposerError\)"),
        ("a: 1\n---\nb: 1", r"2: not valid YAML \(ComposerError\)"),
        ("a:\n\t- b", r"2: not valid YAML \(ScannerError\)"),
        ("", "1: a recipe is a mapping"),
        ("a" * (MAX_BYTES + 1), " a recipe has at most 30,000 bytes"),
    ],
)
def test_hostile_yaml_is_one_sentence_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    refused(path, f"^{path}:.*{message}")


def test_anchors_and_merges_of_a_sane_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: *a\n")
    same = {"x": 1, "y": [2]}
    assert read_recipe_file(path).content == {"a": same, "b": {"x": 3, "y": [2]}, "c": same}


@pytest.mark.parametrize("name", [".", "pipe", "/dev/zero", "none.yaml", "a\0b", "x" * 5_000])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file") as caught:
        load_recipe(tmp_path / name)
    assert caught.value.hint == "see recipes/ for the ones that come with dmax"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", ["tiny_mdlm.yml", "tiny_mdlm", "tny_mdlm.yaml"])
def test_a_mistyped_name_is_told_what_stands_beside_it(tmp_path: Path, name: str) -> None:
    for stem in ("tiny_mdlm", "big"):
        (tmp_path / f"{stem}.yaml").touch()
    with pytest.raises(InputError, match="is not a file") as caught:
        load_recipe(tmp_path / name)
    assert caught.value.hint == f"did you mean `{tmp_path / 'tiny_mdlm.yaml'}`?"


# --- training arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"gradient_accumulation_steps": -1}, "steps` must be a whole number between 1 and"),
        ({"gradient_accumulation_steps": 0}, "steps` must be a whole number between 1 and"),
        ({"dataloader_num_workers": 100_000}, "workers` must be a whole number between 0 and 64"),
        ({"per_device_train_batch_size": 2**40}, "size` must be a whole number between 1 and"),
        ({"save_steps": -5}, "`save_steps` must be a number above 0"),
        ({"save_steps": 0}, "`save_steps` must be a number above 0"),
        ({"save_total_limit": 0}, "`save_total_limit` must be a whole number between 1 and"),
        ({"logging_steps": 0}, "`logging_steps` must be a number above 0"),
        ({"max_steps": 0}, "`max_steps` must be at least 1, or -1"),
        ({"max_steps": -2}, "`max_steps` must be a whole number between -1 and"),
        ({"num_train_epochs": 0.0}, "`num_train_epochs` must be a number above 0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be a number between 0 and"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` must be a number between 0 and"),
        ({"seed": -1}, "`seed` must be a whole number between 0 and"),
        ({"seed": 2**32}, "`seed` must be a whole number between 0 and"),
        ({"mask_ratio_high": 1.5}, "`mask_ratio_high` must be a number between 0 and 1"),
        ({"pad_to": 2**30}, "`pad_to` must be a whole number between 1 and"),
        ({"cad_floor": 2}, "`cad_floor` must be a number between 0 and 1, got 2"),
        ({"cad_temperature": 0}, "`cad_temperature` must be a number above 0"),
        ({"stage_width_first": 0}, "`stage_width_first` must be a whole number between 1 and"),
        ({"stage_width_last": 0}, "`stage_width_last` must be a whole number between 1 and"),
        ({"learning_rate": "1e-4"}, "`training.learning_rate` must be float, got '1e-4'"),
        ({"gradient_checkpointing": "yes"}, "`training.gradient_checkpointing` must be bool"),
        ({"adam_beta1": 1.5}, "Invalid beta"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "nothing takes `a`"),
        ({"lr_scheduler_kwargs": "{bad"}, "Expecting property name"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
        ({"optim": "galore_adamw"}, "galore_torch"),
        ({"optim_args": "a"}, "`training` is not usable"),
        ({"report_to": "nonsense"}, "in `training.report_to`, there is no logger 'nonsense'"),
        ({"report_to": ["dvclive"]}, "dvclive"),
        ({"bf16": True, "use_cpu": False}, "doesn't support bf16"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"tf32": True}, "tf32"),
        ({"deepspeed": "nowhere.json"}, "`training.deepspeed` would not do here what it says"),
        ({"fsdp": "full_shard"}, "`training.fsdp` would not do here what it says"),
        ({"accelerator_config": {"a": 1}}, "nothing takes `a`"),
        ({"accelerator_config": "nowhere.json"}, "nowhere.json"),
        ({"dataloader_persistent_workers": True}, "num_workers"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ({"log_level": "loud"}, "loud"),
        ({"torch_compile_backend": "fast"}, "not a valid DynamoBackend"),
        ({"torch_compile_mode": "fast"}, "`training.torch_compile_mode` cannot be 'fast'"),
        ({"gradient_checkpointing_kwargs": {"x": 1}}, "unknown key `training.gradient_.*x`"),
        ({"eval_strategy": "steps"}, "`eval_strategy` needs a section `eval`"),
        ({"metric_for_best_model": "loss"}, "`training.metric_for_best_model` cannot be 'loss'"),
        ({"push_to_hub": True}, "`training.push_to_hub` would not do here what it says"),
        ({"label_smoothing_factor": 0.1}, "`training.label_smoothing_factor` would not do here"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_transformers_would_find_out_later_is_said_at_once(
    tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    if training.get("use_cpu") is False and torch.cuda.is_available():
        pytest.skip("this machine has bfloat16 on its GPU")
    path = write_recipe(tmp_path, training=training)
    refused(path, rf"^{path}:\d+: .*{message}")


@pytest.mark.parametrize(
    ("training", "hint"),
    [
        ({"lr_scheduler_type": "cosin"}, "did you mean `cosine`?"),
        ({"optim": "adamw_torhc"}, "did you mean `adamw_torch`?"),
        ({"save_strategy": "stepz"}, "did you mean `steps`?"),
        ({"eval_strategy": "sometimes"}, "it may be no, steps, epoch"),
        ({"objective": "opud"}, "did you mean `oput`?"),
        ({"rollout": "argmx"}, "did you mean `argmax`?"),
        ({"lerning_rate": 1.0e-4}, "did you mean `learning_rate`?"),
    ],
)
def test_a_typo_is_told_what_was_meant(tmp_path: Path, training: dict[str, Any], hint: str) -> None:
    path = write_recipe(tmp_path, training=training)
    assert refused(path, r"recipe.yaml:\d+: ").hint == hint


def test_the_line_is_that_of_the_argument(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, training={"warmup_steps": -1, "weight_decay": 0.1})
    line = path.read_text().splitlines().index("  warmup_steps: -1") + 1
    refused(path, f"recipe.yaml:{line}: in `training`, `warmup_steps` must be")


@pytest.mark.parametrize(
    ("objective", "name", "value", "message"),
    [
        ("cforce", "cad_weight", "confidense", "must be one of confidence, doubt"),
        ("cforce", "edited_loss", "mse", "must be one of cad, ce, both, got 'mse'"),
        ("cforce", "stage_draw", "cut", "must be one of states, cuts, got 'cut'"),
        ("cforce", "cad_temperature", 101, "must be a number above 0 and at most 100, got 101"),
        ("mbd_oput", "rollout", "soft", "of mbd_oput must be argmax or sample, got 'soft'"),
    ],
)
def test_a_setting_of_an_objective_is_refused_with_its_line(
    tmp_path: Path, objective: str, name: str, value: Any, message: str
) -> None:
    path = write_recipe(tmp_path, training={"objective": objective, name: value})
    line = path.read_text().splitlines().index(f"  {name}: {value}") + 1
    refused(path, f"recipe.yaml:{line}: in `training`, `{name}` {message}")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    error = refused(write_recipe(tmp_path), "training a model needs the package `accelerate`")
    assert "[train]" in str(error.hint)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_config", "deepspeed"])
def test_sharding_has_a_section_of_its_own(tmp_path: Path, name: str) -> None:
    error = refused(write_recipe(tmp_path, training={name: "x"}), f"`training.{name}` would not do")
    assert "section `fsdp`" in str(error.hint)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "`fsdp` must be a mapping"),
        ({"reduce_dtype": "fp8"}, "`reduce_dtype` must be one of float32, bfloat16, got 'fp8'"),
        ({"reshard": True}, "unknown key `fsdp.reshard`"),
        ({"cpu_offload": "yes"}, "`fsdp.cpu_offload` must be bool, got 'yes'"),
    ],
)
def test_a_wrong_way_to_shard_is_named(tmp_path: Path, section: Any, message: str) -> None:
    refused(write_recipe(tmp_path, fsdp=section), message)


@pytest.mark.parametrize("name", ["fp16", "save_only_model"])
def test_what_does_not_go_with_sharding(tmp_path: Path, name: str) -> None:
    path = write_recipe(tmp_path, fsdp={}, training={name: True})
    refused(path, f"`{name}` does not go with `fsdp`")


def test_trying_the_arguments_leaves_the_working_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, output_dir="deep/er/out")
    load_recipe(path)
    assert os.listdir(tmp_path) == ["recipe.yaml"]


# --- model, data and evaluation -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1_000_000}, "`num_hidden_layers` must be .* between 1 and 1000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_experts": 10**9}, "num_experts"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"hidden_size": 10**9}, "the model would have .* weights in float32, more than fit"),
        ({"vocab_size": 2**32}, "the model would have .* weights"),
        ({"num_attention_heads": 10**8, "num_key_value_heads": 10**8}, "would have .* weights"),
        ({"block_length": 10**6}, "`block_length` must be a whole number between 1 and 4096"),
        ({"attention_dropout": 2.0}, "`attention_dropout` must be a number between 0 and 1"),
        ({"hidden_act": "rello"}, "no model can be made from this configuration: it names 'rello'"),
        ({"rope_parameters": {"rope_type": "flat"}}, "no model can be made .*flat"),
        ({"initializer_range": -1.0}, "`initializer_range` must be at least 0, got -1.0"),
        ({"vocab_size": 3}, "in `model.config`, `mask_token_id` 977 lies outside"),
        ({"mask_token_id": 10**6}, "`mask_token_id` 1000000 lies outside the vocabulary"),
        ({"model_type": ["llama"]}, r"unknown model type \['llama'\]"),
        ({"model_type": "lama"}, "unknown model type 'lama'"),
    ],
)
def test_a_new_model_of_an_impossible_size_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write_recipe(tmp_path, model={"config": CONFIG | change})
    refused(path, rf"^{path}:\d+: .*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"problems": 10**9}}, "`problems` must be a whole number between 1 and 1000000"),
        ({"data": {"problems": 4, "numbers": {"largest": 10**6}}}, "in `data.numbers`, numbers"),
        ({"data": {"problems": 4, "numbers": {"largest": "x"}}}, "`data.numbers.largest` must be"),
        ({"data": {"problems": 4, "numbers": {"largst": 30}}}, "unknown key `data.numbers.largst`"),
        ({"data": {"file": "a", "numbers": {"largest": 30}}}, "`data.numbers` belongs to"),
        ({"data": {"problems": 4, "max_length": 2**40}}, "`max_length` must be a whole number"),
        ({"data": {"file": "/dev/zero"}}, "cannot read /dev/zero: it is a device or a pipe"),
        ({"data": {"file": "nowhere.jsonl"}}, "nowhere.jsonl` is not a file"),
        ({"data": {"file": "empty"}}, "cannot read the folder empty"),
        ({"model": {"config": CONFIG, "attn_implementation": "fast"}}, "attn_implementation"),
        ({"model": {"config": CONFIG, "experts_implementation": "fast"}}, "experts_implementation"),
        ({"model": {"path": "tiny-base", "block_length": 10**6}}, "in `model.block_length`"),
        ({"model": {"path": "tiny-base", "block_length": 0}}, "in `model.block_length`"),
        ({"eval": {"limit": 10**9}}, "in `eval.limit`, `limit` must be a whole number between"),
        ({"eval": {"seed": -1}}, "in `eval.seed`, `seed` must be a whole number between 0"),
        ({"eval": {"limit": None}}, "`eval.limit` must be"),
        ({"data": {"problems": 4, "seed": -1}}, "in `data.seed`, `seed` must be a whole number"),
        ({"eval": {"tsak": "word_problems"}}, "unknown key `eval.tsak`"),
        ({"modle": {}}, "unknown key `modle`"),
        ({"x" * 20_000: 1}, "unknown key `x+…`"),
    ],
)
def test_bounds_of_the_other_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    if "folder" in message:
        pytest.importorskip("datasets")
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
    refused(write_recipe(tmp_path, **change), message)


HELD_OUT = {"problems": 4, "eval_file": "held_out.jsonl"}


@pytest.mark.parametrize("change", [{"eval": {"limit": 1}}, {"data": HELD_OUT}])
def test_what_is_never_evaluated_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    error = refused(
        write_recipe(tmp_path, **change),
        r"recipe.yaml:\d+: in `training`, nothing would be evaluated",
    )
    assert "`eval_strategy: steps`" in str(error.hint)


@pytest.mark.parametrize("training", [{"eval_strategy": "no"}, {"eval_on_start": True}])
def test_evaluations_may_be_off_or_only_once(tmp_path: Path, training: dict[str, Any]) -> None:
    recipe = load_recipe(write_recipe(tmp_path, training=training, eval={"limit": 1}))
    assert recipe.eval is not None
    assert recipe.training.items() >= training.items()


@pytest.mark.parametrize(
    ("objective", "key", "value", "owners"),
    [
        ("oput", "mmd_groups", 4, "mmd"),
        ("mdlm", "rollout", "sample", "oput and mbd_oput"),
        ("mmd", "cad_floor", 0.1, "cforce"),
    ],
)
def test_a_setting_of_another_objective_is_refused(
    tmp_path: Path, objective: str, key: str, value: Any, owners: str
) -> None:
    path = write_recipe(tmp_path, training={"objective": objective, key: value})
    line = path.read_text().splitlines().index(f"  {key}: {value}") + 1
    error = refused(
        path,
        rf"^{path}:{line}: `training.{key}` is a setting of {owners}, and the objective is "
        rf"{objective}\n",
    )
    assert error.hint == "leave it out"


@pytest.mark.parametrize(
    "training",
    [
        {"rollout": "soft", "rollout_temperature": 0.5},
        {
            "objective": "mbd_oput",
            "rollout": "sample",
            "mask_ratio_low": 0.2,
            "mask_ratio_high": 0.8,
        },
        {"objective": "mdlm", "mask_ratio_low": 0.1, "eos_labels": 2},
    ],
)
def test_a_setting_of_its_own_objective_is_taken(tmp_path: Path, training: dict[str, Any]) -> None:
    recipe = load_recipe(write_recipe(tmp_path, training=training))
    assert recipe.training.items() >= training.items()


def test_a_model_is_not_replaced_by_what_starts_from_it(tmp_path: Path) -> None:
    model = {"path": str(tmp_path / "x" / ".." / "out")}
    (tmp_path / "x").mkdir()
    refused(write_recipe(tmp_path, model=model), "`output_dir` is the folder of the model to start")


@pytest.mark.parametrize(
    "lines", ["nonsense\n", '{"prompt": "a"}\n', '{"prompt": "a", "response": ""}\n']
)
@pytest.mark.parametrize("section", ["training", "head"])
def test_wrong_data_is_found_before_a_model_is_loaded(
    tmp_path: Path, lines: str, section: str
) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "data.jsonl"
    file.write_text(lines)
    path = write_recipe(tmp_path, data={"file": str(file)})
    if section == "head":
        recipe = yaml.safe_load(path.read_text())
        del recipe["training"]
        (tmp_path / "out").mkdir()
        recipe |= {"model": {"path": "tiny-base"}, "head": {"kind": "learn2pd"}}
        path.write_text(yaml.safe_dump(recipe))
    refused(path, r"data.jsonl:1: ")


@pytest.mark.parametrize("steps", [{"max_steps": 4}, {"max_steps": 4, "warmup_steps": 2}, {}])
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 0.5}, {"warmup_steps": 3}])
def test_the_schedule_is_tried_to_its_end(
    tmp_path: Path, steps: dict[str, int], warmup: dict[str, float]
) -> None:
    steps = {"max_steps": -1} | warmup | steps
    for kwargs, is_usable in (({"num_cycles": "a"}, False), ({"num_cycles": 2}, True)):
        schedule = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": kwargs}
        path = write_recipe(tmp_path, training=steps | schedule)
        if is_usable:
            load_recipe(path)
        else:
            refused(path, "cosine_with_restarts has no learning rate for step |not usable: .*'a'")


@pytest.mark.parametrize("steps", [{"max_steps": 4}, {"max_steps": -1}, {"max_steps": 90}])
@pytest.mark.parametrize("warmup", [0, 0.1, 3, 100])
@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "polynomial", "inverse_sqrt", "constant_with_warmup"]
)
def test_schedules_that_work_are_not_refused(
    tmp_path: Path, schedule: str, warmup: float, steps: dict[str, int]
) -> None:
    training = {"lr_scheduler_type": schedule, "warmup_steps": warmup} | steps
    assert load_recipe(write_recipe(tmp_path, training=training))
