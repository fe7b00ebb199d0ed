"""More rules for which masked positions to decode, from scores [B, L] to a set [B, L] bool.

Each returns at least one position of every row that still has a mask, so that a block always
progresses. Bounds are one number, or [B, 1] with one for every row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.decoding.strategy import Number


def top(masked: Tensor, score: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] masked positions of highest score, at least one; ties go to the leftmost."""
    return masked & (ranks(masked, score) < count.clamp(min=1)[:, None])


def ranks(masked: Tensor, score: Tensor) -> Tensor:
    """[B, L] int64, how many masked positions have a higher score; the others come last."""
    ordered = torch.where(masked, score, float("-inf"))
    order = ordered.argsort(dim=1, descending=True, stable=True)
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, position)


def within_error(masked: Tensor, confidence: Tensor, factor: Number) -> Tensor:
    """The largest n such that the n-th best has (n + 1) (1 - c_n) <= factor (Fast-dLLM).

    Below a factor of 1 the joint argmax of the chosen positions is the product of their own.
    """
    ranked = torch.where(masked, confidence, float("-inf")).sort(dim=1, descending=True).values
    n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    # As PyTorch divides a number by a tensor. Dividing a column rounds differently.
    fits = ranked >= 1 - (n + 1).reciprocal() * factor
    return top(masked, confidence, fits.cumprod(dim=1).sum(dim=1))


def run_maxima(masked: Tensor, confidence: Tensor) -> Tensor:
    """The best position of every contiguous run of masks, ties to the leftmost (Hierarchy-dLLM)."""
    batch, length = masked.shape
    position = torch.arange(length, device=masked.device).expand(batch, -1)
    starts = masked & ~F.pad(masked[:, :-1], (1, 0))
    run = starts.cumsum(dim=1) * masked  # [B, L], number of the run, 0 outside runs
    slots = confidence.new_full((batch, length + 1), float("-inf"))
    highest = slots.scatter_reduce(1, run, confidence, "amax").gather(1, run)
    best = masked & (confidence == highest)
    first = position.new_full((batch, length + 1), length)
    where = torch.where(best, position, length)
    first = first.scatter_reduce(1, run, where, "amin").gather(1, run)
    return best & (position == first)


def within_entropy(masked: Tensor, entropy: Tensor, bound: Number) -> Tensor:
    """The surest positions while the entropies of all but the last sum to at most `bound` nats.

    That sum bounds the mutual information lost by deciding them together (EB-Sampler,
    arXiv 2505.24857).
    """
    ranked = torch.where(masked, entropy, float("inf")).sort(dim=1).values
    before = F.pad(ranked[:, :-1], (1, 0)).cumsum(dim=1)
    fits = (before <= bound) & ranked.isfinite()
    return top(masked, -entropy, fits.cumprod(dim=1).sum(dim=1))


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats [..., L] of softmax(logits [..., L, V]); a token at -inf adds nothing."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
