"""Which masked positions to decode: pure functions from confidences [B, L] float32 to a set [B, L] bool.

Every comparison in the package is `confidence >= threshold` (A7); a threshold is one number, or [B, 1] for one per row.
Each function returns at least one position of every row that still has a mask, so a block always progresses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmax.decoding.block import leftmost


def most_confident(masked: Tensor, confidence: Tensor) -> Tensor:
    """The masked position of highest confidence in each row; ties go to the leftmost."""
    best = torch.where(masked, confidence, float("-inf")).argmax(dim=1, keepdim=True)
    return torch.zeros_like(masked).scatter(1, best, True) & masked


def prefix(masked: Tensor, confidence: Tensor, threshold: float | Tensor) -> Tensor:
    """The longest run of confident masked positions from the left, else the leftmost one (DMax, section 3.2).

    Scanning the masked positions left to right, stop at the first below the threshold.
    """
    low = masked & (confidence < threshold)
    before_first_low = masked & (low.cumsum(dim=1) == 0)
    return before_first_low | leftmost(masked)


def above(masked: Tensor, confidence: Tensor, threshold: float | Tensor) -> Tensor:
    """Every confident masked position, else the most confident one (LLaDA-2.0, section 5.4)."""
    return (masked & (confidence >= threshold)) | most_confident(masked, confidence)
