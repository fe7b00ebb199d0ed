"""Noise on clean sequences: pure functions of token ids and a random generator.

Shapes: B sequences of L positions. Only the response and its padding are ever changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmax.training.rollout import draw


def mask_ratios(num: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Noise levels t ~ Uniform(low, high), one for each of `num` sequences, [num] float32.

    With low = high they are fixed, as in the paper's experiments (A6 in docs/paper.md).
    """
    return low + (high - low) * torch.rand(num, generator=generator, device=generator.device)


def mask_tokens(
    ids: Tensor,
    corruptible: Tensor,
    ratios: Tensor,
    mask_token_id: int,
    generator: torch.Generator,
) -> Tensor:
    """Replace each corruptible token by MASK with the probability given for it (x_t of eq. 1).

    Args:
        ids: [B, L] int64, clean tokens.
        corruptible: [B, L] bool, the positions that may change.
        ratios: [B] float32 in [0, 1], a probability for each sequence; or [B, L], for each token.
        mask_token_id: MASK.
        generator: of any device.

    Returns:
        [B, L] int64, noisy tokens.
    """
    return ids.masked_fill(_drawn(corruptible, ratios, generator), mask_token_id)


def random_tokens(
    ids: Tensor,
    corruptible: Tensor,
    ratios: Tensor,
    vocab_size: int,
    mask_token_id: int,
    generator: torch.Generator,
) -> Tensor:
    """Replace each corruptible token by a uniformly random one, never MASK (x_t of eq. 2).

    Args:
        ids: [B, L] int64, clean tokens.
        corruptible: [B, L] bool, the positions that may change.
        ratios: [B] float32 in [0, 1], the probability for each sequence.
        vocab_size: number of tokens, MASK included.
        mask_token_id: MASK.
        generator: of any device.

    Returns:
        [B, L] int64, noisy tokens; a random token may be the clean one.
    """
    drawn = _drawn(corruptible, ratios, generator)
    source = generator.device
    noise = torch.randint(vocab_size - 1, ids.shape, generator=generator, device=source)
    noise = noise + (noise >= mask_token_id)  # skips the id of MASK
    return torch.where(drawn, noise.to(ids.device), ids)


def _drawn(corruptible: Tensor, ratios: Tensor, generator: torch.Generator) -> Tensor:
    """The corruptible positions that the given probabilities choose, [B, L] bool."""
    device = corruptible.device
    probability = ratios.view(len(corruptible), -1).to(device)  # [B, 1 or L]
    uniform = draw(corruptible.shape, generator, device)
    return corruptible & (uniform < probability)
