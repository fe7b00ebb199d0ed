"""The LM head without its logits: the most probable tokens of every position.

For a block of 32 positions and 157,184 tokens the logits are 20 MB, which a step would write only
to read them twice. The Triton path (`lm_head_triton.py`) keeps them in registers, one tile of the
vocabulary at a time. The PyTorch twin computes the same in chunks of rows.

Shapes: N positions, D hidden size, V vocabulary, k candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.confidence import (
    LARGEST,
    Candidates,
    GumbelNoise,
    candidates,
    concatenate,
)
from dmax.errors import InputError
from dmax.kernels import can_fuse

MAX_FUSED_CANDIDATES = 8  # the kernel makes one pass over its tile for each of them
CHUNK_BYTES = 64 * 2**20  # float32 logits that the twin holds at once


@torch.no_grad()
def lm_head_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    mask_token_id: int,
    noise: GumbelNoise | None = None,
) -> Candidates:
    """The k best tokens of logits = hidden · weightᵀ, under the rules of `dmax.confidence`.

    Logits are rounded to the dtype of the weights before they are compared, as a model that returns
    logits rounds them. Shapes are static and nothing waits for the device, so a CUDA graph can hold
    the call. There is no gradient.

    The Triton path sums in float32, where the twin sums float32 logits in float64. Probabilities
    agree within 1e-5. Ids differ only where two logits differ by no more than the rounding of their
    dot products.

    Args:
        hidden: [N, D] last hidden states, after the final norm.
        weight: [V, D] of the head, in the dtype of `hidden`.
        k: candidates that are wanted; at most V - 1 are given.
        mask_token_id: MASK.
        noise: of the N positions; with it the first candidate is drawn.

    Raises:
        InputError: k below 1.
    """
    if k < 1:
        message = f"top-{k} of the vocabulary was asked for"
        raise InputError(message, hint="ask for one candidate or more")
    k = min(k, weight.shape[0] - 1)
    if k <= MAX_FUSED_CANDIDATES and can_fuse(weight):
        from dmax.kernels import lm_head_triton

        tiles = lm_head_triton.top_k_of_tiles(hidden, weight, k, mask_token_id, LARGEST, noise)
        return Candidates(*lm_head_triton.merge(tiles))
    return lm_head_top_k_torch(hidden, weight, k, mask_token_id, noise)


def lm_head_top_k_torch(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    mask_token_id: int,
    noise: GumbelNoise | None = None,
) -> Candidates:
    """The twin of the kernel, for any device; k is at most V - 1."""
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    parts = []
    for chunk in hidden.split(rows):
        logits = F.linear(chunk, weight)
        parts.append(candidates(logits, k, mask_token_id, noise))
        noise = noise and noise.behind(rows)
    return concatenate(parts)
