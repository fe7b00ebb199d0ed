"""Adapters: what they adapt, how they are stored beside the name of their base, and read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_llama
from torch import Tensor
from transformers import GPT2Config

from dmax import LLM, DecodingParams
from dmax.adapters import (
    CONFIG,
    WEIGHTS,
    add_adapters,
    base_name,
    find_targets,
    has_adapters,
    lora_config,
)
from dmax.checkpoint import Checkpoint, load_checkpoint, new_checkpoint, save_checkpoint
from dmax.convert import merge_adapters
from dmax.errors import InputError
from dmax.tiny.tokenizer import build_tokenizer

peft = pytest.importorskip("peft")

IDS = torch.arange(5, 69)[None]
TARGETS = (["all-linear"], ["attention"], ["shared_experts"], ["experts"], ["attention", "experts"])


def load(name: Any, **options: Any) -> Checkpoint:
    return load_checkpoint(name, **{"dtype": torch.float32, "device": "cpu", **options})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def trained(checkpoint: Checkpoint, config: Any, base: str) -> Any:
    """Adapters that change something: those of a new one add zero."""
    adapted = add_adapters(checkpoint.model, config, base)
    generator = torch.Generator().manual_seed(0)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += torch.randn(weight.shape, generator=generator) * 0.05
    return adapted


def write(folder: Path, base: str = "tiny-base", targets: Any = ("all-linear",)) -> tuple[Any, Any]:
    """Adapters of a base in a folder, and what the adapted model says."""
    checkpoint = load(base)
    config = lora_config(checkpoint.model, r=4, alpha=8, targets=targets)
    adapted = trained(checkpoint, config, base_name(base))
    save_checkpoint(adapted, checkpoint.tokenizer, folder, checkpoint.special_ids, decoding="spd")
    return checkpoint, logits(adapted)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def dense(folder: Path) -> Path:
    """A small Llama that decodes blocks."""
    made = small_llama(initializer_range=0.3)
    save_checkpoint(made.model, made.tokenizer, folder, made.special_ids, decoding="threshold")
    return folder


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_stored_adapters_are_merged_into_the_base_that_they_name(
    tmp_path: Path, targets: list[str]
) -> None:
    _, expected = write(tmp_path / "adapters", targets=targets)
    stored = json.loads((tmp_path / "adapters" / CONFIG).read_text())
    assert stored["base_model_name_or_path"] == "tiny-base"
    assert not (tmp_path / "adapters" / "model.safetensors").exists()

    found = load(tmp_path / "adapters")
    torch.testing.assert_close(logits(found.model), expected, atol=1e-3, rtol=1e-3)
    assert (logits(load("tiny-base").model) - expected).abs().max() > 1
    assert not has_adapters(found.model)
    assert type(found.model) is type(load("tiny-base").model)
    assert all(weight.requires_grad for weight in found.model.parameters())
    assert found.decoding == "spd"
    assert found.special_ids == load("tiny-base").special_ids


def test_adapters_of_a_dense_backbone_are_merged(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    checkpoint, expected = write(tmp_path / "adapters", str(base))
    assert (
        "lm_head" not in json.loads((tmp_path / "adapters" / CONFIG).read_text())["target_modules"]
    )
    found = load(tmp_path / "adapters")
    torch.testing.assert_close(logits(found.model), expected, atol=1e-4, rtol=1e-4)
    assert found.special_ids == checkpoint.special_ids
    # The mask alone decides who sees whom, as it did before.
    tail = logits(found.model)[:, 0] - found.model(input_ids=IDS[:, :32]).logits[:, 0]
    assert tail.abs().max() > 1e-3


def test_layers_with_turned_weights_are_adapted_too(tmp_path: Path) -> None:
    ids = {"mask_token_id": 99, "eos_token_id": 98, "bos_token_id": 98, "block_length": 8}
    shape = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    made = new_checkpoint(GPT2Config(**shape, **ids, initializer_range=0.3))
    save_checkpoint(made.model, None, tmp_path / "base", made.special_ids)
    _, expected = write(tmp_path / "adapters", str(tmp_path / "base"))
    targets = json.loads((tmp_path / "adapters" / CONFIG).read_text())["target_modules"]
    assert len(targets) == 2 * 4 and "transformer.h.1.attn.c_attn" in targets
    torch.testing.assert_close(
        logits(load(tmp_path / "adapters").model), expected, atol=1e-4, rtol=1e-4
    )


def test_llm_decodes_adapters_as_it_decodes_the_merged_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "adapters")
    merge_adapters(tmp_path / "adapters", tmp_path / "merged")
    assert not (tmp_path / "merged" / CONFIG).exists()
    params = DecodingParams(max_new_tokens=32)
    answers = []
    for folder in ("adapters", "merged"):
        llm = LLM(str(tmp_path / folder), dtype="float32", device="cpu")
        assert llm.model.has_linear_head
        assert llm.resolve(params).strategy == "spd"
        answers.append(llm.generate("Tom has 3 mugs and buys 4. How many?", params)[0].token_ids)
    assert answers[0] == answers[1]


def test_experts_are_quantised_with_their_adapters(tmp_path: Path) -> None:
    write(tmp_path / "adapters", targets=["experts"])
    merge_adapters(tmp_path / "adapters", tmp_path / "merged")
    one = load(tmp_path / "adapters", quantization="int8")
    other = load(tmp_path / "merged", quantization="int8")
    torch.testing.assert_close(logits(one.model), logits(other.model))


def test_peft_reads_what_is_stored(tmp_path: Path) -> None:
    _, expected = write(tmp_path / "adapters")
    base = load("tiny-base").model
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)


def test_adapters_of_another_program_take_ids_and_tokenizer_from_their_base(tmp_path: Path) -> None:
    _, expected = write(tmp_path / "adapters")
    for file in (tmp_path / "adapters").iterdir():
        if file.name not in (CONFIG, WEIGHTS):
            file.unlink()
    found = load(tmp_path / "adapters")
    torch.testing.assert_close(logits(found.model), expected, atol=1e-3, rtol=1e-3)
    assert found.tokenizer is not None
    assert found.decoding == "threshold"  # what the base says of itself


def test_a_mask_token_that_a_run_added_is_added_again(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    tokenizer = build_tokenizer()
    tokenizer.mask_token = None
    plain = json.loads((base / "config.json").read_text())
    del plain["mask_token_id"]
    (base / "config.json").write_text(json.dumps(plain))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (base / name).read_text().replace("<|mask|>", "<|other|>")
        (base / name).write_text(text)
    edit(base / "tokenizer_config.json", mask_token=None)

    checkpoint = load(base, add_mask_token=True)
    config = lora_config(checkpoint.model, r=2, alpha=4)
    adapted = trained(checkpoint, config, str(base))
    expected = logits(adapted)
    save_checkpoint(adapted, checkpoint.tokenizer, tmp_path / "adapters", checkpoint.special_ids)
    found = load(tmp_path / "adapters")
    assert found.special_ids == checkpoint.special_ids
    torch.testing.assert_close(logits(found.model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig", "OFTConfig"])
def test_other_methods_within_the_layers_are_merged_too(tmp_path: Path, method: str) -> None:
    checkpoint = load("tiny-base")
    options = {"oft_block_size": 8} if method == "OFTConfig" else {"r": 4}
    config = getattr(peft, method)(target_modules=["query_key_value"], **options)
    adapted = trained(checkpoint, config, "tiny-base")
    expected = logits(adapted)
    save_checkpoint(adapted, checkpoint.tokenizer, tmp_path / "adapters", checkpoint.special_ids)
    found = logits(load(tmp_path / "adapters").model)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (found - logits(load("tiny-base").model)).abs().max() > 0.1


def test_targets_are_the_layers_of_their_kind() -> None:
    model = load("tiny-base").model
    attention, _ = find_targets(model, ["attention"])
    others, _ = find_targets(model, ["shared_experts"])
    assert {name.rpartition(".")[2] for name in attention} == {"query_key_value", "dense"}
    assert {name.rpartition(".")[2] for name in others} == {"gate_proj", "up_proj", "down_proj"}
    assert find_targets(model, ["all-linear"]) == (sorted(attention + others), [])
    _, stacked = find_targets(model, ["experts"])
    assert len(stacked) == 6
    assert {name.rpartition(".")[2] for name in stacked} == {"gate_up_proj", "down_proj"}
    assert find_targets(model, ["dense"]) == (["dense"], [])


def test_a_dense_model_has_no_experts_to_adapt(tmp_path: Path) -> None:
    model = load(dense(tmp_path / "base")).model
    with pytest.raises(InputError, match="LlamaForCausalLM has no `experts`"):
        find_targets(model, ["experts"])


def test_a_configuration_without_layers_takes_all_linear_ones() -> None:
    model = load("tiny-base").model
    adapted = add_adapters(model, peft.LoraConfig(task_type="CAUSAL_LM"), "tiny-base")
    assert {"query_key_value", "down_proj"} <= set(adapted.active_peft_config.target_modules)


def refuse_prompts(model: Any) -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (refuse_prompts, "is of the method 'PROMPT_TUNING'"),
        (lambda _: peft.LoraConfig(target_modules=["nowhere"]), "do not go with the model"),
        (lambda _: peft.LoraConfig(target_modules=["lm_head"]), "output layer cannot be adapted"),
        (
            lambda _: peft.LoraConfig(modules_to_save=["lm_head"], target_modules=["dense"]),
            "output layer cannot be adapted",
        ),
        (lambda _: peft.LoraConfig(target_modules=["word_embeddings"]), "cannot be adapted"),
        (lambda _: {"r": 8}, "a configuration of peft"),
        (
            lambda model: lora_config(model, r=4, alpha=8, dropout=0.1, targets=["experts"]),
            "take no `dropout`",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(config: Any, message: str) -> None:
    model = load("tiny-base").model
    with pytest.raises(InputError, match=message):
        add_adapters(model, config(model), "tiny-base")


def test_a_base_is_named_so_that_it_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_name("base") == str(tmp_path / "base")
    assert base_name("tiny-base") == "tiny-base"
    assert base_name("inclusionAI/LLaDA2.0-mini") == "inclusionAI/LLaDA2.0-mini"
    write(tmp_path / "adapters")
    with pytest.raises(InputError, match="cannot be the base of others"):
        base_name("adapters")


def set_base(folder: Path, name: Any) -> None:
    edit(folder / CONFIG, base_model_name_or_path=name)


def rename_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    first = sorted(weights)[0]
    weights[first.replace("lora", "lore")] = weights.pop(first)
    save_file(weights, folder / WEIGHTS)


def put_nan(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights[sorted(weights)[0]].fill_(torch.nan)
    save_file(weights, folder / WEIGHTS)


def make_base_of_itself(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("other"))
    set_base(folder, str(folder.with_name("other")))


def take_another_base(folder: Path) -> None:
    set_base(folder, str(dense(folder.with_name("dense"))))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: set_base(folder, "/nowhere/base"), "base model of the adapters .* missing"),
        (lambda folder: set_base(folder, None), "names no base model"),
        (make_base_of_itself, "holds adapters itself"),
        (take_another_base, "do not go with their base model|does not fit|lacks"),
        (lambda folder: edit(folder / CONFIG, r=8), "has the shape"),
        (lambda folder: edit(folder / CONFIG, peft_type="PROMPT_TUNING"), "'PROMPT_TUNING'"),
        (lambda folder: edit(folder / CONFIG, peft_type=7), "of the method 7"),
        (lambda folder: edit(folder / CONFIG, r="many"), "not usable|do not go with"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), "is missing"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"torn"), "not a readable safetensors"),
        (rename_weight, "lacks 1 weights"),
        (put_nan, "cannot be merged"),
    ],
)
def test_damaged_or_foreign_adapters_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "adapters"
    write(folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        load(folder)
    assert "\n" not in raised.value.message


def test_no_module_that_adapters_name_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "adapters")
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(
        tmp_path / "adapters" / CONFIG,
        megatron_config={"a": 1},
        megatron_core="evil",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        revision="evil",
    )
    load(tmp_path / "adapters")


def test_without_peft_one_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "adapters")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    monkeypatch.setattr("dmax.extras.find_spec", lambda _: None)
    with pytest.raises(InputError, match="loading the adapters in .* needs the package `peft`"):
        load(tmp_path / "adapters")
