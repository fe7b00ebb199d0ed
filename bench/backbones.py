"""Models of published shapes with random weights: speed depends on the shape alone, and no file need be downloaded."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from dmax.checkpoint import Checkpoint, new_checkpoint


def llama_135m(dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> Checkpoint:
    """A Llama of SmolLM2-135M's shape: 134.5 million parameters, tied embeddings, blocks of 32.

    It takes and gives token ids. EOS is drawn like any other of 49,152 tokens, so completions run to `max_new_tokens`
    all but surely.
    """
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        eos_token_id=0,
        mask_token_id=49_151,
        block_length=32,
    )
    torch.manual_seed(0)
    return new_checkpoint(config, dtype=dtype, attn_implementation=attn_implementation)
