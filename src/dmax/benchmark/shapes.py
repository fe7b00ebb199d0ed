"""Models of published shapes with random weights: speed depends on the shape, not on the values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.models import LLaDA2MoeConfig

BLOCK_LENGTH = 32


def llama_135m(dtype: torch.dtype = torch.float32, **changes: Any) -> Checkpoint:
    """A Llama of SmolLM2-135M's shape, 134.5 million parameters; `changes` to its configuration."""
    shape: dict[str, Any] = {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    } | changes
    config = LlamaConfig(
        **shape, eos_token_id=0, mask_token_id=shape["vocab_size"] - 1, block_length=BLOCK_LENGTH
    )
    torch.manual_seed(0)
    return new_checkpoint(config, dtype=dtype)


def llada2_mini(dtype: torch.dtype, device: torch.device, **changes: Any) -> Checkpoint:
    """LLaDA-2.0-mini, 16.3 billion parameters, drawn on the device; `changes` to its shape."""
    config = LLaDA2MoeConfig(**{"mask_token_id": 156_895, "block_length": BLOCK_LENGTH} | changes)
    torch.manual_seed(0)
    with torch.device(device):
        return new_checkpoint(config, dtype=dtype, experts_implementation="fused_moe")
