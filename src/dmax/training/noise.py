"""Corruption of clean sequences: pure functions of token ids and a random generator.

B sequences, L positions. Only positions marked corruptible (the response and its padding) are ever
touched.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_ratios(
    num: int, low: float, high: float, generator: torch.Generator | None = None
) -> Tensor:
    """Noise levels t ~ Uniform(low, high) per sequence, [num] float32; low = high gives the paper's fixed ratio."""
    return low + (high - low) * torch.rand(num, generator=generator)


def rising_ratios(corruptible: Tensor, block_length: int, low: float, high: float) -> Tensor:
    """Noise levels [B, L] float32 that rise evenly from `low` in a response's first block to `high` in its last (D2F).

    `corruptible` [B, L] bool marks the response and its padding; a response of one block has `low`
    everywhere.
    """
    block = torch.arange(corruptible.shape[1], device=corruptible.device) // block_length
    first = block[corruptible.int().argmax(dim=1)][:, None]
    return low + (high - low) * ((block - first) / (block[-1] - first).clamp(min=1)).clamp(min=0)


def mask_tokens(
    ids: Tensor,
    corruptible: Tensor,
    ratios: Tensor,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace each corruptible token by MASK independently with its sequence's probability (eq. 1's x_t).

    Args:
        ids: [B, L] int64 clean tokens.
        corruptible: [B, L] bool.
        ratios: [B] float32 in [0, 1], or [B, L], one for every position.
        mask_token_id: what masked positions become.
        generator: CPU generator; None uses torch's global one.

    Returns:
        [B, L] int64 noisy tokens.
    """
    ratios = ratios.view(len(ids), -1).to(ids.device)
    drawn = torch.rand(ids.shape, generator=generator).to(ids.device) < ratios
    return ids.masked_fill(drawn & corruptible, mask_token_id)


def random_tokens(
    ids: Tensor,
    corruptible: Tensor,
    ratios: Tensor,
    vocab_size: int,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace each corruptible token by a uniformly random one, never MASK, with its sequence's probability (eq. 2).

    Shapes as in `mask_tokens`.
    """
    drawn = (
        torch.rand(ids.shape, generator=generator).to(ids.device) < ratios.to(ids.device)[:, None]
    )
    noise = torch.randint(vocab_size - 1, ids.shape, generator=generator).to(ids.device)
    noise = noise + (noise >= mask_token_id)  # skip the mask token's id
    return torch.where(drawn & corruptible, noise, ids)
