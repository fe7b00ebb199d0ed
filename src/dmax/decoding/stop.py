"""When a block is finished, per sequence; all tensors [B, L] bool unless said otherwise, results [B] bool.

For comparisons of bools see `dmax.decoding.block`.
"""

from __future__ import annotations

from torch import Tensor


def consistent(masked: Tensor, changed: Tensor) -> Tensor:
    """Every position is decoded and none changed in this step: two steps agree (DMax, section 3.2, criterion 1)."""
    return ~(masked | changed).any(dim=1)


def confident(active: Tensor, masked: Tensor, confidence: Tensor, stop_confidence: float) -> Tensor:
    """Every position is decoded with `confidence` [B, L] float32 of at least `stop_confidence` (criterion 2).

    Unlike the published test it never fires while a mask is left (A8).
    """
    return (((confidence >= stop_confidence) > masked) | ~active).all(dim=1)
