"""The on-policy rollout: what the model itself says in place of the masks (DMax, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmax.confidence import candidates


def draw(shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), float32, from a generator of any device."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


@torch.no_grad()
def pick(
    logits: Tensor, mask_token_id: int, temperature: float = 0.0, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token for each row of logits, x̂_i ~ p_θ(· | x^(m)) (eq. 3), and its probability.

    One uniform number decides a row's sample, whichever rows are sampled together.

    Args:
        logits: [..., V], any float dtype.
        mask_token_id: MASK, which is never picked.
        temperature: 0 takes the most probable token, as the published code does; else
            softmax(logits / temperature) is sampled, at 1 as the equation is written (A1 in
            docs/paper.md).
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
