"""Which masked positions to decode, from confidences [B, L] float32 to a set [B, L] bool.

Every comparison in the package is `confidence >= threshold` (A7 in docs/paper.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmax.decoding.strategy import Number


def above(
    masked: Tensor, confidence: Tensor, threshold: Number, must_progress: Tensor | None = None
) -> Tensor:
    """Every confident masked position, else the most confident one (LLaDA-2.0, section 5.4).

    Args:
        masked: [B, L] bool.
        confidence: [B, L] float32.
        threshold: one number, or [B, 1].
        must_progress: [B] bool, rows where at least one mask is decoded; None: all rows.
    """
    surest = most_confident(masked, confidence)
    if must_progress is not None:
        surest = surest & must_progress[:, None]
    return (masked & (confidence >= threshold)) | surest


def most_confident(masked: Tensor, confidence: Tensor) -> Tensor:
    """The masked position of highest confidence in each row; ties go to the leftmost."""
    surest = torch.where(masked, confidence, float("-inf")).argmax(dim=1, keepdim=True)
    return masked & torch.zeros_like(masked).scatter(1, surest, True)
