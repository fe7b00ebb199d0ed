"""Decoders of transformers, one of each architecture: small, with random weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dmax import LLM, DecodingParams
from dmax.checkpoint import new_checkpoint
from dmax.errors import InputError
from dmax.kernels.moe import PLAIN_EXPERTS
from dmax.models.auto import register
from dmax.training.clean_stream import CleanStream

L = 8
EOS = 1
MASK = 3
NUM_NEW = 16
PROMPTS = ([5], [2, 4, 9, 8, 7, 6], list(range(6, 30)))
GROUPED = {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ROUTED = {"num_experts_per_tok": 2}
DENSE: dict[str, dict[str, Any]] = {
    "apertus": GROUPED,
    "arcee": GROUPED,
    "bert": {"is_decoder": True},
    "codegen": GPT | {"rotary_dim": 4},
    "cohere": GROUPED,
    "ctrl": {},
    "diffllama": GROUPED,
    "ernie4_5": WIDE,
    "gemma": WIDE,
    "glm4": WIDE,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {},
    "gptj": GPT | {"rotary_dim": 4},
    "granite": GROUPED,
    "helium": WIDE,
    "hunyuan_v1_dense": WIDE,
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "nemotron": GROUPED,
    "olmo2": GROUPED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "persimmon": {},
    "phi": GROUPED | {"partial_rotary_factor": 0.5},
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "roberta": {"is_decoder": True},
    "seed_oss": WIDE,
    "smollm3": GROUPED,
    "starcoder2": GROUPED,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "glm4_moe": WIDE
    | ROUTED
    | {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    "gpt_oss": WIDE | ROUTED | {"num_local_experts": 4, "sliding_window": 128},
    "granitemoe": GROUPED | ROUTED | {"num_local_experts": 4},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8} | GROUPED,
    "minimax_m2": WIDE | ROUTED | {"num_local_experts": 4},
    "mixtral": GROUPED | ROUTED | {"num_local_experts": 4},
    "olmoe": GROUPED | ROUTED | {"num_experts": 4},
    "phimoe": GROUPED | ROUTED | {"num_local_experts": 4},
    "qwen3_moe": WIDE | ROUTED | {"num_experts": 4, "moe_intermediate_size": 16},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_head": 4, "n_layer": 2}, "attends through transformers' attention interface"),
    "deepseek_v3": ({}, "latent attention"),
    "electra": ({"embedding_size": 16, "is_decoder": True}, "before its output embedding"),
    "exaone4": (GROUPED | {"sliding_window": 8}, "`sliding_window` 8"),
    "gemma2": (WIDE | {"sliding_window": 8}, "`sliding_window` 8"),
    "gemma4_text": (WIDE | {"sliding_window": 128}, "of different sizes"),
    "gpt_oss": (WIDE | {"num_local_experts": 4, "sliding_window": 8}, "`sliding_window` 8"),
    "lfm2": (
        GROUPED | {"layer_types": ["conv", "full_attention"]},
        "attends through transformers' attention interface",
    ),
    "mamba": ({}, "attends through transformers' attention interface"),
    "mistral": (GROUPED | {"sliding_window": 8}, "`sliding_window` 8"),
}


def config_of(kind: str, changes: dict[str, Any]) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "eos_token_id": EOS,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    return CONFIG_MAPPING[kind](**(fields | changes))


@pytest.mark.parametrize(("kind", "changes"), (DENSE | MIXTURES).items())
def test_an_unconverted_one_writes_what_transformers_does(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, changes)).eval()
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    params = DecodingParams(max_new_tokens=NUM_NEW)
    outputs = LLM(str(tmp_path), dtype="float32").generate(list(PROMPTS), params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        given = torch.tensor([prompt])
        written = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NUM_NEW, do_sample=False
        )
        expected = written[0, len(prompt) :].tolist()
        assert list(output.token_ids) == [token for token in expected if token != EOS]


def test_an_unconverted_one_has_no_blocks(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config_of("llama", {})).save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32")
    with pytest.raises(InputError, match="writes one token a forward, and no blocks of 4"):
        llm.generate([[5, 6]], DecodingParams(block_length=4))
    params = DecodingParams(max_new_tokens=4)
    assert llm.generate([[5, 6]], replace(params, block_length=1)) == llm.generate([[5, 6]], params)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("kind", "changes"), (DENSE | MIXTURES).items())
def test_training_shows_a_block_what_stands_before_it(
    kind: str, changes: dict[str, Any], shift: bool
) -> None:
    """In two streams, of which the second reads what the first has recorded of the clean half."""
    torch.manual_seed(1)
    own = {"mask_token_id": MASK, "block_length": L, "shift": shift}
    experts = "eager" if kind in MIXTURES else None  # others do not compute in float64
    config = config_of(kind, changes | own)
    model = new_checkpoint(config, dtype=torch.float64, experts_implementation=experts).model
    embed = model.get_input_embeddings()
    clean = torch.randint(4, 64, (2, 3 * L))
    with torch.no_grad():
        stream = CleanStream(model, clean, L)
        for ratio in (0.3, 0.8):
            noisy = clean.masked_fill(torch.rand(clean.shape) < ratio, MASK)
            trained = stream.denoise(embed(noisy)).logits().view(2, 3 * L, -1)
            for first in range(0, 3 * L, L):
                end = first + L
                seen = torch.cat((clean[:, :first], noisy[:, first:end]), dim=1)
                position = torch.arange(end)
                alone = model(
                    inputs_embeds=embed(seen),
                    attention_mask=(position[:, None] // L >= position // L)[None, None],
                    position_ids=position[None],
                ).logits
                predicted = position[max(first, int(shift)) :]  # nothing predicts position 0
                torch.testing.assert_close(
                    trained[:, predicted], alone[:, predicted - int(shift)], rtol=1e-9, atol=1e-9
                )


@pytest.mark.parametrize(("kind", "told"), REFUSED.items())
def test_one_that_cannot_be_masked_is_refused(kind: str, told: tuple[dict[str, Any], str]) -> None:
    changes, reason = told
    config = config_of(kind, changes | {"mask_token_id": MASK, "block_length": L})
    with pytest.raises(InputError, match="cannot be a block-diffusion backbone") as error:
        new_checkpoint(config)
    assert reason in error.value.message


@pytest.mark.parametrize("kind", PLAIN_EXPERTS)
def test_our_experts_run_where_experts_are_what_they_compute(kind: str) -> None:
    register()
    names = ("num_experts", "num_local_experts", "moe_num_experts", "num_experts_per_tok")
    changes = WIDE | {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    config = config_of(kind, changes | dict.fromkeys(names, 2) | {"first_k_dense_replace": 0})
    assert config.num_experts == 2
    with torch.device("meta"):
        modules = list(AutoModelForCausalLM.from_config(config).modules())
    layers: list[Any] = [each for each in modules if hasattr(each, "has_gate")]
    assert layers
    for experts in layers:
        more = (experts.has_bias, experts.is_transposed, experts.has_post_expert_norm)
        assert experts.has_gate and experts.is_concatenated and not any(more)
        assert type(experts)._apply_gate.__module__ == "transformers.integrations.moe"


def test_the_docs_name_what_is_tested() -> None:
    page = Path(__file__).parents[2] / "docs" / "backbones.md"
    listed = page.read_text(encoding="utf-8").partition("test_architectures.py")[2]
    names = re.findall(r"`(\w+)`", listed.partition("Unconverted")[0])
    assert names == [*DENSE, *MIXTURES]
