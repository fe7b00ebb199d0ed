"""LLaDA-2.1-mini by its published config.json: mask, block length, and its own decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dmax import LLM, DecodingParams, DMaxConfig, DMaxTrainer
from dmax.checkpoint import load_checkpoint, save_checkpoint
from dmax.decoding import get_strategy
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM

# config.json of inclusionAI/LLaDA2.1-mini, its sizes made small.
SMALL: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_group": 2,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "rotary_dim": 4,
    "topk_group": 1,
    "vocab_size": 157184,
}
PUBLISHED = SMALL | {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "dtype": "float32",
    "embedding_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_router_enable_expert_bias": True,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
    "use_bias": False,
    "use_cache": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}
LLADA20 = {"max_position_embeddings": 16384}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as it is published, under a name that says nothing."""
    folder = tmp_path / "snapshot"
    LLaDA2MoeModelLM(LLaDA2MoeConfig(**SMALL)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    (folder / "generation_config.json").unlink(missing_ok=True)
    vocabulary = {"a": 0, "<|endoftext|>": 156892, "<|mask|>": 156895}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(PUBLISHED | changes))


def test_its_files_say_mask_eos_and_decoding(folder: Path) -> None:
    checkpoint = load_checkpoint(folder, dtype="auto", device="cpu")
    ids = checkpoint.special_ids
    assert (ids.mask_token_id, ids.eos_token_ids, ids.block_length) == (156895, (156892,), 32)
    assert checkpoint.decoding == "joint_threshold"


def test_auto_is_its_own_decoding(folder: Path) -> None:
    llm = LLM(folder)
    resolved = llm.resolve(DecodingParams())
    assert get_strategy(resolved).name == "joint_threshold"
    params = DecodingParams(max_new_tokens=32, ignore_eos=True)
    [auto] = llm.generate([[1, 2, 3]], params)
    joint = DecodingParams(strategy="joint_threshold", max_new_tokens=32, ignore_eos=True)
    [named] = llm.generate([[1, 2, 3]], joint)
    assert auto == named and len(auto.token_ids) == 32


def test_llada20_and_what_names_its_decoding_keep_theirs(folder: Path) -> None:
    edit(folder, **LLADA20)
    assert load_checkpoint(folder, dtype="auto", device="cpu").decoding is None
    edit(folder, decoding_strategy="spd")
    assert load_checkpoint(folder, dtype="auto", device="cpu").decoding == "spd"
    dmax = folder.rename(folder.with_name("DMax-Math-16B"))
    edit(dmax)
    assert load_checkpoint(dmax, dtype="auto", device="cpu").decoding == "spd"


def test_it_learns_and_its_copy_keeps_the_decoding(folder: Path, tmp_path: Path) -> None:
    read = load_checkpoint(folder, dtype="auto", device="cpu")
    save_checkpoint(
        read.model, read.tokenizer, tmp_path / "copy", read.special_ids, decoding=read.decoding
    )
    assert load_checkpoint(tmp_path / "copy", dtype="auto", device="cpu").decoding == read.decoding
    trainer = DMaxTrainer(
        folder,
        DMaxConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            gradient_accumulation_steps=1,
            warmup_steps=0,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=[{"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6, 7, 8]}],
    )
    assert trainer.train().training_loss > 0
    trainer.save_model(str(tmp_path / "trained"))
    record = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert record["decoding_strategy"] == "spd"  # what OPUT trains for


def test_the_two_modes_of_its_card_are_options() -> None:
    for threshold, edit_threshold in ((0.5, 0.0), (0.7, 0.5)):
        params = DecodingParams(
            strategy="joint_threshold",
            threshold=threshold,
            options={"edit_threshold": edit_threshold},
        )
        strategy: Any = get_strategy(params)
        assert (strategy.threshold, strategy.edit_threshold) == (threshold, edit_threshold)
        assert strategy.post_steps == 16
