"""SDAR as it is published: its config.json, Qwen3's weights, and nobody's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dmax import LLM, DecodingParams, DMaxConfig, DMaxTrainer
from dmax.attention import block_causal, dense_mask
from dmax.checkpoint import load_checkpoint, save_checkpoint
from dmax.recipe.estimate.shape import read_shape
from dmax.recipe.file import RecipeFile
from dmax.recipe.sections import DataSection, ModelSection, Recipe
from dmax.special_ids import SpecialIds

# config.json of JetLM/SDAR-4B-Chat, its sizes made small. Others of the family also name
# `block_size` and `mask_token_id`.
PUBLISHED: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "bos_token_id": 151643,
    "debug": False,
    "eos_token_id": 151643,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
EXPERTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
PUBLISHED_MOE = (
    PUBLISHED
    | EXPERTS
    | {
        "architectures": ["SDARMoeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
            "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
        },
        "model_type": "sdar_moe",
    }
)
SIZES = (
    "head_dim hidden_size intermediate_size num_attention_heads num_hidden_layers "
    "num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings vocab_size"
).split()
RECORDS = {"sdar": PUBLISHED, "sdar_moe": PUBLISHED_MOE}
each_kind = pytest.mark.parametrize("kind", RECORDS)
IDS = torch.arange(100, 116)[None]


def original(kind: str) -> Any:
    """The Qwen3 whose weights a published folder has."""
    torch.manual_seed(0)
    sizes = {name: PUBLISHED[name] for name in SIZES} | {"initializer_range": 0.3}
    if kind == "sdar":
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **EXPERTS)).eval()


def write(folder: Path, kind: str, **changes: Any) -> Path:
    """A published folder: the weights of the original beside a config.json of SDAR."""
    original(kind).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(RECORDS[kind] | changes))
    return folder


@each_kind
def test_mask_and_block_length_are_those_of_the_family(kind: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write(tmp_path / "SDAR", kind), dtype="auto", device="cpu")
    ids = checkpoint.special_ids
    assert (ids.mask_token_id, ids.block_length, ids.eos_token_ids) == (151669, 4, (151643,))
    assert checkpoint.decoding is None  # `threshold`, as its own dynamic remasking


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("SDAR-8B-Chat-b32", {}, 32),
        ("SDAR-30B-A3B-Chat-b8", {}, 8),
        ("SDAR-8B-Chat-b32", {"block_size": 16}, 16),
        ("mine-b32", {}, 4),
        ("mine", {"block_size": 64, "mask_token_id": 7}, 64),
    ],
)
def test_other_block_lengths_are_in_the_files_or_in_the_name(
    name: str, changes: dict[str, int], expected: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / name, "sdar", **changes)
    ids = load_checkpoint(folder, dtype="auto", device="cpu").special_ids
    assert ids.block_length == expected
    assert ids.mask_token_id == changes.get("mask_token_id", 151669)
    told = load_checkpoint(folder, dtype="auto", device="cpu", block_length=2).special_ids
    assert told.block_length == 2


def test_adapters_that_say_nothing_have_the_block_length_in_the_name_of_their_base(
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    base = write(tmp_path / "SDAR-8B-Chat-b32", "sdar")
    adapted = peft.get_peft_model(original("sdar"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "mine-b8")
    ids = load_checkpoint(tmp_path / "mine-b8", dtype="auto", device="cpu").special_ids
    assert ids.block_length == 32


@pytest.mark.parametrize(("asked", "expected"), [(None, 32), (2, 2)])
def test_a_dry_run_counts_the_block_length_in_the_name(
    asked: int | None, expected: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / "SDAR-8B-Chat-b32", "sdar")
    section = ModelSection(path=str(folder), block_length=asked)
    file = RecipeFile(tmp_path / "recipe.yaml", {}, {})
    recipe = Recipe(file, tmp_path / "made", section, DataSection(problems=4))
    assert read_shape(recipe, on_gpu=False).special_ids.block_length == expected


@torch.no_grad()
@each_kind
def test_the_network_is_qwen3s_and_reads_the_position_itself(kind: str, tmp_path: Path) -> None:
    qwen = original(kind)
    model = load_checkpoint(write(tmp_path / "SDAR", kind), dtype="auto", device="cpu").model
    places = torch.arange(IDS.shape[1])
    causal = dense_mask(block_causal(1), places, places)[None, None]
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=causal).logits, qwen(IDS).logits)
    assert not getattr(model.config, "shift", False)


@each_kind
def test_it_decodes_and_learns(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "SDAR", kind)
    llm = LLM(folder)
    [output] = llm.generate([IDS[0].tolist()], DecodingParams(max_new_tokens=8, ignore_eos=True))
    assert len(output.token_ids) == 8
    trainer = DMaxTrainer(
        folder,
        DMaxConfig(
            output_dir=str(tmp_path / "run"),
            objective="mdlm",
            max_steps=1,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
            warmup_steps=0,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=[{"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6, 7, 8]}],
    )
    before = trainer.model.lm_head.weight.clone()
    assert trainer.train().training_loss > 0
    assert not torch.equal(trainer.model.lm_head.weight, before)


@each_kind
def test_what_is_saved_is_an_sdar_again(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "SDAR-1.7B-Chat-b16", kind)
    read = load_checkpoint(folder, dtype="auto", device="cpu")
    save_checkpoint(read.model, read.tokenizer, tmp_path / "saved", read.special_ids)
    record = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert record["model_type"] == kind
    assert record["architectures"] == RECORDS[kind]["architectures"]
    assert record["block_size"] == record["block_length"] == 16
    assert (record["mask_token_id"], record["rope_theta"]) == (151669, 1_000_000)
    assert "auto_map" not in record
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = load_checkpoint(tmp_path / "saved", dtype="auto", device="cpu")
    assert again.special_ids == read.special_ids


def test_tokenizer_and_network_come_without_their_code(tmp_path: Path) -> None:
    folder = write(tmp_path / "SDAR", "sdar")
    words = {"a": 0, "<|endoftext|>": 151643, "<|im_end|>": 151645, "<|MASK|>": 151669}
    backend = Tokenizer(WordLevel(words, unk_token="a"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "mask_token": "<|MASK|>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    code = {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    for name in ("tokenization_qwen2.py", "modeling_sdar.py", "configuration_sdar.py"):
        (folder / name).write_text("raise AssertionError('code of a checkpoint ran')\n")
    ends = {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(ends))

    read = load_checkpoint(folder, dtype="auto", device="cpu")
    assert read.special_ids == SpecialIds(151669, (151645, 151643), 151643, 4)
    assert read.tokenizer is not None and read.tokenizer.mask_token_id == 151669
    save_checkpoint(read.model, read.tokenizer, tmp_path / "saved", read.special_ids)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "saved" / name).read_text())


@each_kind
def test_transformers_loads_it_without_its_code(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "SDAR", kind)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(model).__module__ == "dmax.models.sdar.modeling"
    assert type(model).__name__ == RECORDS[kind]["architectures"][0]
