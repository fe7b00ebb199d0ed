"""Corruption of clean sequences: pure functions of token ids and a random generator.

B sequences, L positions. Only positions marked corruptible (the response and its padding) are ever touched.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_ratios(num: int, low: float, high: float, generator: torch.Generator | None = None) -> Tensor:
    """Noise levels t ~ Uniform(low, high) per sequence, [num] float32; low = high gives the paper's fixed ratio."""
    return low + (high - low) * torch.rand(num, generator=generator)


def mask_tokens(
    ids: Tensor, corruptible: Tensor, ratios: Tensor, mask_token_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """Replace each corruptible token by MASK independently with its sequence's probability (eq. 1's x_t).

    Args:
        ids: [B, L] int64 clean tokens.
        corruptible: [B, L] bool.
        ratios: [B] float32 in [0, 1].
        mask_token_id: what masked positions become.
        generator: CPU generator; None uses torch's global one.

    Returns:
        [B, L] int64 noisy tokens.
    """
    drawn = torch.rand(ids.shape, generator=generator).to(ids.device) < ratios.to(ids.device)[:, None]
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
    drawn = torch.rand(ids.shape, generator=generator).to(ids.device) < ratios.to(ids.device)[:, None]
    noise = torch.randint(vocab_size - 1, ids.shape, generator=generator).to(ids.device)
    noise = noise + (noise >= mask_token_id)  # skip the mask token's id
    return torch.where(drawn & corruptible, noise, ids)
