"""Soft inputs: a decoded position fed back as a confidence-weighted mixture of token and mask embedding.

Decoding (SPD) and training (soft on-policy rollouts) build their inputs with this one function. What travels through
the program is the descriptor, token ids and probabilities; embeddings are made only where the model needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SoftTokens:
    """Descriptor of soft inputs for B sequences of L positions with k candidates each.

    Attributes:
        where: [B, L] bool, positions to be fed softly; the rest take their hard token.
        ids: [B, L, k] int64, candidate tokens, the first being the position's own token.
        probs: [B, L, k] float32, their probabilities; the rest of the mass belongs to the mask token.
        renormalize: restore the length of the mixture (eq. 10); off only for ablations.
    """

    where: Tensor
    ids: Tensor
    probs: Tensor
    renormalize: bool = True


def blend(token_embeds: Tensor, mask_embed: Tensor, probs: Tensor, *, renormalize: bool = True) -> Tensor:
    """Mix token and mask embeddings by confidence and restore the length (paper eqs. 8-10, any number of candidates).

        h̃ = Σ_k π_k e(y_k) + (1 - Σ_k π_k) e_mask                                    (8, 9)
        h  = h̃ / ‖h̃‖ · (Σ_k π_k ‖e(y_k)‖ + (1 - Σ_k π_k) ‖e_mask‖)                   (10)

    Without (10) averaging nearly orthogonal vectors shrinks them, to 0.71 of their length at π = 0.5.

    Args:
        token_embeds: [..., k, D] embeddings of the candidates, any float dtype.
        mask_embed: [D] embedding of the mask token.
        probs: [..., k] float32 probabilities, summing to at most 1.
        renormalize: apply (10); off only for ablations.

    Returns:
        [..., D] in the dtype of `token_embeds`; computed in float32 or better.
    """
    dtype = torch.promote_types(token_embeds.dtype, torch.float32)
    tokens, mask = token_embeds.to(dtype), mask_embed.to(dtype)
    weights = probs.to(dtype)[..., None]  # [..., k, 1]
    rest = 1.0 - weights.sum(dim=-2)  # [..., 1], mass on the mask token
    mixed = (weights * tokens).sum(dim=-2) + rest * mask  # [..., D]
    if renormalize:
        norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)  # [..., k, 1]
        target = (weights * norms).sum(dim=-2) + rest * torch.linalg.vector_norm(mask)
        mixed = mixed * (target / (torch.linalg.vector_norm(mixed, dim=-1, keepdim=True) + 1e-6))
    return mixed.to(token_embeds.dtype)


def embed_tokens(embed: Embed, tokens: Tensor, soft: SoftTokens | None, mask_token_id: int) -> Tensor:
    """Input embeddings [B, L, D]: hard for `tokens` [B, L], blended where `soft` says so."""
    hard = embed(tokens)
    if soft is None:
        return hard
    mask_embed = embed(torch.full((1,), mask_token_id, dtype=torch.long, device=tokens.device))[0]
    mixed = blend(embed(soft.ids), mask_embed, soft.probs, renormalize=soft.renormalize)
    return torch.where(soft.where[..., None], mixed, hard)
