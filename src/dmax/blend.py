"""Soft inputs: a decoded position fed back as a confidence-weighted mixture of token and mask embedding.

Decoding (SPD) and training (soft on-policy rollouts) build their inputs with this one function.
What travels through the program is the descriptor, token ids and probabilities; embeddings are made
only where the model needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmax.kernels import FUSED_DTYPES, implementation, triton_kernels

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SoftTokens:
    """Descriptor of soft inputs for B sequences of L positions with k candidates each.

    Attributes:
        where: [B, L] bool, positions to be fed softly; the rest take their hard token.
        ids: [B, L, k] int64, candidate tokens, the first being the position's own token.
        probs: [B, L, k] float32, their probabilities; the rest of the mass belongs to the mask
            token.
        renormalize: restore the length of the mixture (eq. 10); off only for ablations.
    """

    where: Tensor
    ids: Tensor
    probs: Tensor
    renormalize: bool = True


def blend(
    token_embeds: Tensor,
    mask_embed: Tensor,
    probs: Tensor,
    *,
    where: Tensor | None = None,
    renormalize: bool = True,
) -> Tensor:
    """Mix token and mask embeddings by confidence and restore the length (paper eqs. 8-10, any number of candidates).

        h̃ = Σ_k π_k e(y_k) + (1 - Σ_k π_k) e_mask                                    (8, 9)
        h  = h̃ / ‖h̃‖ · (Σ_k π_k ‖e(y_k)‖ + (1 - Σ_k π_k) ‖e_mask‖)                   (10)

    Without (10) averaging nearly orthogonal vectors shrinks them, to 0.71 of their length at π =
    0.5.

    Args:
        token_embeds: [..., k, D] embeddings of the candidates, any float dtype.
        mask_embed: [D] embedding of the mask token.
        probs: [..., k] float32 probabilities, summing to at most 1.
        where: [..., 1] bool, what to blend; the rest are their first candidates as they are. None:
            blend all.
        renormalize: apply (10); off only for ablations.

    Returns:
        [..., D] in the dtype of `token_embeds`; computed in float32 or better.
    """
    dtype = torch.promote_types(token_embeds.dtype, torch.float32)
    tokens = token_embeds.to(dtype)
    mask = mask_embed.to(dtype)
    if where is not None:  # choosing between whole embeddings at the end takes far longer
        probs = torch.where(where, probs, torch.eye(1, probs.shape[-1], device=probs.device))
    weights = probs.to(dtype)[..., None]  # [..., k, 1]
    rest = 1.0 - _total(weights)  # [..., 1, 1], mass on the mask token
    mixed = _total(weights * tokens) + rest * mask  # [..., 1, D]
    if renormalize:
        norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)  # [..., k, 1]
        target = _total(weights * norms) + rest * torch.linalg.vector_norm(mask)
        scale = target / (
            torch.linalg.vector_norm(mixed, dim=-1, keepdim=True) + 1e-6
        )  # [..., 1, 1]
        mixed = mixed * (scale if where is None else torch.where(where[..., None], scale, 1.0))
    return mixed.squeeze(-2).to(token_embeds.dtype)


def _total(values: Tensor) -> Tensor:
    """The sum over candidates, [..., k, X] to [..., 1, X]; of a single one nothing is to be done."""
    return values if values.shape[-2] == 1 else values.sum(dim=-2, keepdim=True)


def embed_tokens(
    embed: Embed, tokens: Tensor, soft: SoftTokens | None, mask_token_id: int
) -> Tensor:
    """Input embeddings [B, L, D]: hard for `tokens` [B, L], blended where `soft` says so.

    Without gradients, on a GPU and from a plain table one kernel does it all
    (`dmax.kernels.blend_triton`), up to the order of float32 sums. Shapes are static and nothing
    waits for the device.
    """
    if soft is None:
        return embed(tokens)
    table = None if torch.is_grad_enabled() else _table(embed)
    is_fused = table is not None and implementation(table.device) == "triton"
    if table is not None and is_fused and table.dtype in FUSED_DTYPES:
        return triton_kernels("blend").embed_soft(
            table, tokens, soft.where, soft.ids, soft.probs, mask_token_id, soft.renormalize
        )
    where = soft.where[..., None]
    ids = torch.where(where, soft.ids, tokens[..., None])
    mask_embed = (
        embed(tokens.new_full((1,), mask_token_id))[0] if table is None else table[mask_token_id]
    )
    return blend(embed(ids), mask_embed, soft.probs, where=where, renormalize=soft.renormalize)


def _table(embed: Embed) -> Tensor | None:
    """The weights [V, D] of an embedding that looks tokens up and does nothing else; None of any other."""
    if type(embed) is not nn.Embedding or embed.max_norm is not None:
        return None
    wrapped = "forward" in vars(embed) or embed._forward_hooks or embed._forward_pre_hooks
    return None if wrapped else embed.weight
