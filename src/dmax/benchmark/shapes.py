"""LLaDA-2.0-mini with random weights: speed depends on the shape, not on the values."""

from __future__ import annotations

from typing import Any

import torch

from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.models import LLaDA2MoeConfig

BLOCK_LENGTH = 32


def llada2_mini(dtype: torch.dtype, device: torch.device, **changes: Any) -> Checkpoint:
    """LLaDA-2.0-mini, 16.3 billion parameters, drawn on the device; `changes` to its shape."""
    config = LLaDA2MoeConfig(**{"mask_token_id": 156_895, "block_length": BLOCK_LENGTH} | changes)
    torch.manual_seed(0)
    with torch.device(device):
        return new_checkpoint(config, dtype=dtype, experts_implementation="fused_moe")
