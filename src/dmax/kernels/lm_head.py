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

from dmax.confidence import LARGEST, Candidates, candidates, concatenate, take_best
from dmax.errors import InputError
from dmax.kernels import can_fuse, triton_kernels

MAX_FUSED_CANDIDATES = 8  # the kernel makes one pass over its tile for each of them
CHUNK_BYTES = 64 * 2**20  # float32 logits that the twin holds at once


@torch.no_grad()
def lm_head_top_k(hidden: Tensor, weight: Tensor, k: int, mask_token_id: int) -> Candidates:
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

    Raises:
        InputError: k below 1.
    """
    if k < 1:
        message = f"top-{k} of the vocabulary was asked for"
        raise InputError(message, hint="ask for one candidate or more")
    k = min(k, weight.shape[0] - 1)
    if k <= MAX_FUSED_CANDIDATES and can_fuse(weight):
        kernels = triton_kernels("lm_head")
        return merge_tiles(*kernels.top_k_of_tiles(hidden, weight, k, mask_token_id, LARGEST))
    return lm_head_top_k_torch(hidden, weight, k, mask_token_id)


def lm_head_top_k_torch(hidden: Tensor, weight: Tensor, k: int, mask_token_id: int) -> Candidates:
    """The twin of the kernel, for any device; k is at most V - 1."""
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    parts = []
    for chunk in hidden.split(rows):
        logits = F.linear(chunk, weight)
        parts.append(candidates(logits, k, mask_token_id))
    return concatenate(parts)


def merge_tiles(best: Tensor, ids: Tensor, peak: Tensor, mass: Tensor) -> Candidates:
    """The best tokens of the whole vocabulary from those of its T tiles.

    Tiles stand in the order of the vocabulary, and equal logits within a tile in the order of their
    ids. So the first of equal candidates is the one with the lowest id.

    Args:
        best: [T, k, N] the highest logits of each tile, in descending order.
        ids: [T, k, N] int32, their tokens.
        peak: [T, N] the highest logit of each tile, MASK's included.
        mass: [T, N] the sum of exp(logit - peak) over each tile.
    """
    highest = peak.amax(dim=0)  # [N]
    scale = (peak - highest).exp()
    total = (mass * scale).sum(dim=0)  # [N]
    k = best.shape[1]
    logits, index = take_best(best.flatten(0, 1).T, k)  # [N, k]
    tokens = ids.flatten(0, 1).T.gather(-1, index)
    probs = (logits - highest[:, None]).exp() / total[:, None]
    return Candidates(tokens.long(), probs, total.isnan())
