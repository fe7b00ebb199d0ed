"""What the next forward sees at each position, as descriptors; the runner turns them into embeddings."""

from __future__ import annotations

from torch import Tensor

from dmax.blend import SoftTokens
from dmax.decoding.block import Prediction


def soft_feed(decoded: Tensor, prediction: Prediction, *, renormalize: bool = True) -> SoftTokens:
    """Feed `decoded` positions [B, L] bool as blends of prediction and mask by confidence (DMax, eqs. 7-10)."""
    return SoftTokens(
        where=decoded, ids=prediction.ids, probs=prediction.probs, renormalize=renormalize
    )
