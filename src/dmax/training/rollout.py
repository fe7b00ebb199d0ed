"""The on-policy rollout: what the model itself says in place of the masks (DMax, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmax.confidence import candidates


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
    shape = logits.shape[:-1]
    draws = draw(shape, generator, logits.device) if temperature else None
    tokens, _ = pick(logits, mask_token_id, temperature, draws)
    return tokens


def draw(shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), float32, from a generator of any device."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


@torch.no_grad()
def pick(
    logits: Tensor, mask_token_id: int, temperature: float = 0.0, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token for each row of logits, and the probability that the model gives it.

    One uniform number decides a row's sample, whichever rows are sampled together.

    Args:
        logits: [..., V], any float dtype.
        mask_token_id: MASK, which is never picked.
        temperature: 0 takes the most probable token; else softmax(logits / temperature) is sampled.
        draws: [...] float32 in [0, 1), of the samples.

    Returns:
        [...] int64 tokens, and their probabilities [...].
    """
    if draws is None:
        best = candidates(logits, 1, mask_token_id)
        return best.tokens, best.confidence
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    scaled = logits.to(dtype) / temperature
    scaled[..., mask_token_id] = -torch.inf
    mass = scaled.softmax(dim=-1).cumsum(dim=-1)  # [..., V]
    level = draws.to(dtype) * mass[..., -1]
    tokens = torch.searchsorted(mass, level[..., None], right=True)  # [..., 1]
    probs = logits.softmax(dim=-1, dtype=dtype).gather(-1, tokens)
    return tokens[..., 0], probs[..., 0].to(torch.promote_types(logits.dtype, torch.float32))
