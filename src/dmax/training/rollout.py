"""The on-policy rollout: what the model itself says in place of the masks (DMax, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmax.confidence import candidates
from dmax.training.clean_stream import IGNORE


@torch.no_grad()
def roll_out(
    logits: Tensor,
    mask_token_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Predict every position at once, without gradient: x̂_i ~ p_θ(· | x^(m)) (eq. 3).

    Args:
        logits: [B, L, V] of the masked stream, any float dtype.
        mask_token_id: MASK, which is never predicted.
        temperature: 0 takes the most probable token, as the published code does; 1 samples, as
            the equation is written (A1 in docs/paper.md).
        generator: random source of the samples; a temperature of 0 needs none.

    Returns:
        [B, L] int64 token ids.
    """
    if temperature == 0:
        return candidates(logits, 1, mask_token_id).ids[..., 0]
    scaled = logits.float() / temperature
    scaled[..., mask_token_id] = -torch.inf
    drawn = torch.multinomial(scaled.softmax(dim=-1).flatten(0, 1), 1, generator=generator)
    return drawn.view(logits.shape[:-1])


def rollout_error(predicted: Tensor, labels: Tensor, is_masked: Tensor) -> Tensor:
    """The share of labelled masks whose prediction is not the clean token, a scalar.

    Args:
        predicted: [B, L] int64, tokens of a rollout.
        labels: [B, L] int64, the clean tokens, or `IGNORE`.
        is_masked: [B, L] bool.
    """
    counted = is_masked & (labels != IGNORE)
    wrong = counted & (predicted != labels)
    return wrong.sum() / counted.sum().clamp(min=1)
