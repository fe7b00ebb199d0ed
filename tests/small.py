"""Models that are small enough to be made for a test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM, backbone
from dmax.tiny.tokenizer import build_tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_llama(**changes: Any) -> Checkpoint:
    """A Llama that decodes blocks, with the tokenizer of the bundled models."""
    tokenizer = build_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id")}
    config = LlamaConfig(
        **SHAPE,
        **ids,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=256,
        block_length=16,
        **changes,
    )
    return new_checkpoint(config, tokenizer)


def small_network(kind: str, attention: str, *, vocab_size: int, eos: int, head_dim: int) -> Any:
    """A "llada2_moe", or a decoder of transformers, that is the same each time; EOS pads, too."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        **SHAPE,
        "vocab_size": vocab_size,
        "head_dim": head_dim,
        "initializer_range": 0.15,
        "pad_token_id": eos,
        "eos_token_id": eos,
        "attn_implementation": attention,
    }
    if kind != "llada2_moe":
        config = CONFIG_MAPPING[kind](**fields)
        network = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return backbone.as_block_diffusion(network)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = LLaDA2MoeConfig(**fields, **experts, n_group=2, topk_group=1)
    config._experts_implementation = "eager"
    return LLaDA2MoeModelLM(config)
