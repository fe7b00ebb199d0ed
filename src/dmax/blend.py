"""Soft inputs: a decoded position is fed back as a mixture of its token and the mask embedding.

Decoding (SPD) and training (soft on-policy rollouts) build their inputs with `embed_tokens`. The
program passes around the descriptor `SoftTokens`, which is token ids and probabilities. Embeddings
are made only where the model needs them.

Shapes: B sequences, L positions, k candidates for each, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmax.kernels import can_fuse

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SoftTokens:
    """Which positions are fed softly, and with which candidates.

    Attributes:
        where: [B, L] bool, positions to be fed softly; the others take their hard token.
        ids: [B, L, k] int64, candidate tokens; the first is the position's own token.
        probs: [B, L, k] float32, their probabilities; the rest belongs to the mask token.
        renormalize: restore the length of the mixture (equation 10); off only for ablations.
        masked: [B, L] bool, positions that take their hard token in any case; None: there are none.
    """

    where: Tensor
    ids: Tensor
    probs: Tensor
    renormalize: bool = True
    masked: Tensor | None = None


def embed_tokens(
    embed: Embed,
    tokens: Tensor,
    soft: SoftTokens | None,
    mask_token_id: int,
    rows: Tensor | None = None,
) -> Tensor:
    """Input embeddings [B, L, D]: hard for `tokens` [B, L], and blended where `soft` says so.

    On a GPU one kernel does it all, from a plain table and without gradients. It differs only in
    the order of float32 sums. Shapes are static and nothing waits for the device.

    Args:
        embed: from ids to embeddings.
        tokens: [B, L] int64.
        soft: with the same leading dimension; None: every token is hard.
        mask_token_id: MASK.
        rows: [N] int64, the sequences that are wanted, in this order; None: all.
    """
    table = _plain_table(embed)
    if soft is not None and table is not None and can_fuse(table, soft.probs):
        from dmax.kernels import blend_triton

        return blend_triton.embed_soft(table, tokens, soft, mask_token_id, rows)
    every = slice(None) if rows is None else rows
    tokens = tokens[every]
    if soft is None:
        return embed(tokens)
    where = soft.where[every]
    if soft.masked is not None:
        where = where & ~soft.masked[every]
    where = where[..., None]
    ids = torch.where(where, soft.ids[every], tokens[..., None])
    probs = soft.probs[every]
    mask_embed = embed(tokens.new_full((1,), mask_token_id))[0]
    return blend(embed(ids), mask_embed, probs, where=where, renormalize=soft.renormalize)


def blend(
    token_embeds: Tensor,
    mask_embed: Tensor,
    probs: Tensor,
    *,
    where: Tensor | None = None,
    renormalize: bool = True,
) -> Tensor:
    """Mix token and mask embeddings by confidence, and restore the length (equations 8-10).

        h̃ = Σ_k π_k e(y_k) + (1 - Σ_k π_k) e_mask                                    (8, 9)
        h  = h̃ / ‖h̃‖ · (Σ_k π_k ‖e(y_k)‖ + (1 - Σ_k π_k) ‖e_mask‖)                   (10)

    Nearly orthogonal vectors become shorter when they are averaged, by a factor of 0.71 at π = 0.5.
    Equation 10 makes up for that. The paper writes the equations for one candidate; here are k.

    Args:
        token_embeds: [..., k, D] embeddings of the candidates, any float dtype.
        mask_embed: [D] embedding of the mask token.
        probs: [..., k] float32 probabilities, which sum to at most 1.
        where: [..., 1] bool, which positions are blended; the others keep their first candidate.
            None: all are blended.
        renormalize: apply equation 10; off only for ablations.

    Returns:
        [..., D] in the dtype of `token_embeds`, computed in float32 or better.
    """
    dtype = torch.promote_types(token_embeds.dtype, torch.float32)
    tokens = token_embeds.to(dtype)
    mask = mask_embed.to(dtype)
    if where is not None:  # to choose between whole embeddings at the end would take far longer
        only_first = torch.eye(1, probs.shape[-1], device=probs.device)
        probs = torch.where(where, probs, only_first)
    weights = probs.to(dtype)[..., None]  # [..., k, 1]
    rest = 1.0 - _sum(weights)  # [..., 1, 1], the mask token's share
    mixed = _sum(weights * tokens) + rest * mask  # [..., 1, D]
    if renormalize:
        token_norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)  # [..., k, 1]
        target = _sum(weights * token_norms) + rest * torch.linalg.vector_norm(mask)
        length = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)  # [..., 1, 1]
        scale = target / (length + 1e-6)
        if where is not None:
            scale = torch.where(where[..., None], scale, 1.0)
        mixed = mixed * scale
    return mixed.squeeze(-2).to(token_embeds.dtype)


def _sum(values: Tensor) -> Tensor:
    """The sum over candidates, from [..., k, X] to [..., 1, X]; a single one is its own sum."""
    return values if values.shape[-2] == 1 else values.sum(dim=-2, keepdim=True)


def _plain_table(embed: Embed) -> Tensor | None:
    """The weights [V, D] of an embedding that only looks tokens up; None for any other."""
    if type(embed) is not nn.Embedding or embed.max_norm is not None:
        return None
    is_wrapped = "forward" in vars(embed) or embed._forward_hooks or embed._forward_pre_hooks
    return None if is_wrapped else embed.weight
