"""The shapes of published models, without their weights: speed and memory depend on them alone."""

from __future__ import annotations

from typing import Any

import torch

from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.models import LLaDA2MoeConfig

BLOCK_LENGTH = 32
IDS = {"mask_token_id": 156_895, "block_length": BLOCK_LENGTH}
# What differs from LLaDA-2.0-mini.
FLASH = {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LONGER = {"max_position_embeddings": 32_768}
PUBLISHED: dict[str, dict[str, Any]] = {
    "inclusionAI/LLaDA2.0-mini": {},
    "inclusionAI/LLaDA2.0-flash": FLASH,
    "inclusionAI/LLaDA2.1-mini": LONGER,
    "inclusionAI/LLaDA2.1-flash": {**FLASH, **LONGER},
    "Zigeng/DMax-16B": {},
    "Zigeng/DMax-Math-16B": {},
    "Zigeng/DMax-Coder-16B": {},
}


def published_config(name: str) -> LLaDA2MoeConfig | None:
    """The configuration behind the hub id of a published model; None for any other name."""
    changes = PUBLISHED.get(name)
    return None if changes is None else LLaDA2MoeConfig(**{**IDS, **changes})


def llada2_mini(dtype: torch.dtype, device: torch.device, **changes: Any) -> Checkpoint:
    """LLaDA-2.0-mini, 16.3 billion parameters, drawn on the device; `changes` to its shape."""
    config = LLaDA2MoeConfig(**{**IDS, **changes})
    torch.manual_seed(0)
    with torch.device(device):
        return new_checkpoint(config, dtype=dtype, experts_implementation="fused_moe")
