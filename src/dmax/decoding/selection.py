"""Which masked positions to decode: pure functions from confidences [B, L] float32 to a set [B, L] bool.

Every comparison in the package is `confidence >= threshold` (A7); a threshold is one number, or [B,
1] for one per row. Each function returns at least one position of every row that still has a mask,
so a block always progresses; of a row that `forced` [B] bool excludes, one ahead of an unfinished
block, it returns confident positions only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def most_confident(masked: Tensor, confidence: Tensor) -> Tensor:
    """The masked position of highest confidence in each row; ties go to the leftmost."""
    return masked & torch.zeros_like(masked).scatter(1, _surest(masked, confidence), True)


def _surest(masked: Tensor, confidence: Tensor) -> Tensor:
    """Where it stands, [B, 1]; anywhere in a row without masks."""
    return torch.where(masked, confidence, float("-inf")).argmax(dim=1, keepdim=True)


def prefix(
    masked: Tensor, confidence: Tensor, threshold: float | Tensor, forced: Tensor | None = None
) -> Tensor:
    """The longest run of confident masked positions from the left, else the leftmost one (DMax, section 3.2).

    Scanning the masked positions left to right, stop at the first below the threshold.
    """
    seen = masked.cumsum(dim=1)
    sure = (masked & (confidence >= threshold)).cumsum(dim=1)
    return masked & (seen <= sure.clamp(min=1 if forced is None else forced[:, None]))


def above(
    masked: Tensor, confidence: Tensor, threshold: float | Tensor, forced: Tensor | None = None
) -> Tensor:
    """Every confident masked position, else the most confident one (LLaDA-2.0, section 5.4)."""
    sure = confidence >= threshold
    surest = _surest(masked, confidence)
    if forced is None:
        return masked & sure.scatter(1, surest, True)
    return masked & sure.scatter(1, surest, sure.gather(1, surest) | forced[:, None])


def top(masked: Tensor, score: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] masked positions of highest `score` [B, L], at least one; ties go to the leftmost."""
    order = torch.where(masked, score, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return masked & (rank < count.clamp(min=1)[:, None])


def within_error(masked: Tensor, confidence: Tensor, factor: float) -> Tensor:
    """The most confident positions as long as the n-th has (n + 1) (1 - c_n) <= `factor` (Fast-dLLM, factor rule).

    Below a factor of 1 the joint argmax of the chosen positions is the product of their own.
    """
    ranked = torch.where(masked, confidence, float("-inf")).sort(dim=1, descending=True).values
    n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    fits = ranked >= 1 - factor / (n + 1)
    return top(masked, confidence, fits.cumprod(dim=1).sum(dim=1))


def run_maxima(masked: Tensor, confidence: Tensor) -> Tensor:
    """The most confident position of every contiguous run of masks, ties to the leftmost (Hierarchy-dLLM)."""
    batch, length = masked.shape
    position = torch.arange(length, device=masked.device).expand(batch, -1)
    starts = masked & ~torch.nn.functional.pad(masked[:, :-1], (1, 0))
    run = starts.cumsum(dim=1) * masked  # [B, L], 0 outside runs
    slots = confidence.new_full((batch, length + 1), float("-inf"))
    highest = slots.scatter_reduce(1, run, confidence, "amax").gather(1, run)
    best = masked & (confidence == highest)
    first = position.new_full((batch, length + 1), length)
    first = first.scatter_reduce(1, run, torch.where(best, position, length), "amin").gather(1, run)
    return best & (position == first)


def within_entropy(masked: Tensor, entropy: Tensor, bound: float) -> Tensor:
    """The least uncertain positions as long as the entropies [B, L] of all but the last sum to `bound` nats at most.

    That sum bounds the mutual information lost by deciding them together (EB-Sampler, arXiv
    2505.24857).
    """
    ranked = torch.where(masked, entropy, float("inf")).sort(dim=1).values
    before = torch.nn.functional.pad(ranked[:, :-1], (1, 0)).cumsum(dim=1)
    fits = (before <= bound) & ranked.isfinite()
    return top(masked, -entropy, fits.cumprod(dim=1).sum(dim=1))


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats [..., L] of softmax(logits [..., L, V]); an excluded token (-inf) adds nothing."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
