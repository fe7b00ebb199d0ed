"""The LM head without its logits: the most probable tokens of every position and their probabilities.

At a block of 32 positions and 157,184 tokens the logits are 20 MB that a step writes only to read
them twice. The Triton path (`lm_head_triton.py`) keeps them in registers, a tile of the vocabulary at
a time; the PyTorch twin here computes the same in chunks of rows. N positions, D hidden size, V
vocabulary, k candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.confidence import Candidates, candidates
from dmax.errors import InputError
from dmax.kernels import implementation, triton_kernels

MAX_FUSED_CANDIDATES = 8  # the kernel makes one pass over its tile for each
CHUNK_BYTES = 64 * 2**20  # of float32 logits that the twin holds at once


@torch.no_grad()
def lm_head_top_k(hidden: Tensor, weight: Tensor, k: int, mask_token_id: int) -> Candidates:
    """Top-k tokens and probabilities of logits = hidden · weightᵀ, with the rules of decoding.

    MASK is never a candidate but counts in the softmax; infinite logits are clamped to ±`LARGEST`.
    Logits are rounded to the dtype of the weights before they are compared, as a model that returns
    logits rounds them. Shapes are static and nothing waits for the device, so a CUDA graph can hold
    the call. No gradient.

    The Triton path sums in float32, where the twin sums float32 logits in float64: probabilities
    within 1e-5, and other ids only where two logits differ by no more than the rounding of their
    dot products.

    Args:
        hidden: [N, D] last hidden states, after the final norm.
        weight: [V, D] of the head, in the dtype of `hidden`.
        k: candidates wanted; at most V - 1 are given.
        mask_token_id: MASK.

    Raises:
        InputError: k below 1.
    """
    if k < 1:
        raise InputError(
            f"top-{k} of the vocabulary was asked for", hint="ask for one candidate or more"
        )
    k = min(k, weight.shape[0] - 1)
    if (
        implementation(weight.device) == "triton"
        and k <= MAX_FUSED_CANDIDATES
        and weight.dtype != torch.float64
    ):
        return triton_kernels("lm_head").lm_head_top_k(hidden, weight, k, mask_token_id)
    return lm_head_top_k_torch(hidden, weight, k, mask_token_id)


def lm_head_top_k_torch(hidden: Tensor, weight: Tensor, k: int, mask_token_id: int) -> Candidates:
    """The twin of the kernel, for any device; see `lm_head_top_k`. Here k is at most V - 1."""
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    if len(hidden) <= rows:
        return candidates(F.linear(hidden, weight), k, mask_token_id)
    parts = [candidates(F.linear(part, weight), k, mask_token_id) for part in hidden.split(rows)]
    return Candidates(
        *(torch.cat([getattr(part, name) for part in parts]) for name in Candidates.__slots__)
    )
