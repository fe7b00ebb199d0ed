"""The Triton path of `lm_head.py`. Importing this imports triton.

Every program multiplies a tile of the vocabulary with a tile of the positions, accumulates in
float32 and reduces the logits while they are in registers: the largest logit, the sum of
exponentials, the k best tokens. What is stored for a tile and position is 2 k + 2 numbers (of 1,228
tiles instead of 157,184 logits), merged by a few PyTorch operations of static shape. The weights
are read once, which is what the time goes to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.confidence import LARGEST, Candidates, take_best


class Tile(NamedTuple):
    """Work of one program: sizes of its tile, and how the hardware runs it."""

    vocabulary: int
    size: int  # of a step along D
    warps: int
    stages: int


@triton.jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, best, ids, peak, mass, num_tokens, vocabulary, size, mask_token_id,
    K: tl.constexpr, LARGEST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Positions vary fastest, so that programs side by side share a tile of the weights in the L2
    # cache.
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    row = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.arange(0, BLOCK_D)
    is_token = token < num_tokens
    is_row = row < vocabulary

    # logits = weight · hiddenᵀ, [BLOCK_V, BLOCK_N]: the long side first, as tensor cores want 64
    # rows or more.
    weight_at = weight + row.to(tl.int64)[:, None] * size + column[None, :]
    hidden_at = hidden + token[None, :] * size + column[:, None]
    logits = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_D):
        inside = start + column < size
        rows = tl.load(weight_at + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        tokens = tl.load(hidden_at + start, mask=inside[:, None] & is_token[None, :], other=0.0)
        logits = tl.dot(rows, tokens, logits, input_precision="ieee")
    logits = logits.to(weight.dtype.element_ty).to(
        tl.float32
    )  # round as a model that returns logits does

    # A NaN is kept out of the maxima, so that ids stay inside the vocabulary, and makes the sum a
    # NaN. Rows beyond the vocabulary are zeros, which an infinite hidden state turns into NaNs of
    # no meaning.
    nan = (logits != logits) & is_row[:, None]
    finite = tl.where(nan, 0.0, tl.minimum(tl.maximum(logits, -LARGEST), LARGEST))
    finite = tl.where(is_row[:, None], finite, float("-inf"))
    highest = tl.max(finite, axis=0)  # [BLOCK_N], above -inf: a tile begins inside the vocabulary
    shares = tl.exp(tl.where(nan, logits, finite) - highest[None, :])
    at = tile * num_tokens + token
    tl.store(peak + at, highest, mask=is_token)
    tl.store(mass + at, tl.sum(shares, axis=0), mask=is_token)

    finite = tl.where((row == mask_token_id)[:, None], float("-inf"), finite)
    for rank in tl.static_range(K):
        value, index = tl.max(
            finite, axis=0, return_indices=True, return_indices_tie_break_left=True
        )
        at = (tile * K + rank) * num_tokens + token
        tl.store(best + at, value, mask=is_token)
        tl.store(ids + at, tile * BLOCK_V + index, mask=is_token)
        finite = tl.where(tl.arange(0, BLOCK_V)[:, None] == index[None, :], float("-inf"), finite)


def lm_head_top_k(
    hidden: Tensor, weight: Tensor, k: int, mask_token_id: int, tile: Tile | None = None
) -> Candidates:
    """`dmax.kernels.lm_head.lm_head_top_k` for float32, float16 and bfloat16; `tile` is for tuning.

    Here k is at most V - 1 and small.
    """
    num_tokens, size = hidden.shape
    vocabulary = weight.shape[0]
    block_n = min(128, max(16, triton.next_power_of_2(num_tokens)))
    tile = tile or default_tile(block_n, weight.dtype)
    num_tiles = triton.cdiv(vocabulary, tile.vocabulary)

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, num_tokens, dtype=dtype, device=hidden.device)

    best = new(num_tiles, k, dtype=torch.float32)
    ids = new(num_tiles, k, dtype=torch.int32)
    peak = new(num_tiles, dtype=torch.float32)
    mass = new(num_tiles, dtype=torch.float32)
    kernel: Any = _tile_kernel
    kernel[triton.cdiv(num_tokens, block_n), num_tiles](
        hidden.contiguous(), weight.contiguous(), best, ids, peak, mass, num_tokens, vocabulary, size, mask_token_id,
        K=k, LARGEST=LARGEST, BLOCK_V=tile.vocabulary, BLOCK_N=block_n, BLOCK_D=tile.size,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _merge(best, ids, peak, mass, k)


def _merge(best: Tensor, ids: Tensor, peak: Tensor, mass: Tensor, k: int) -> Candidates:
    """One answer from T tiles: best and ids [T, k, N], peak and mass [T, N].

    Tiles stand in the order of the vocabulary, and equal logits of one tile in the order of their
    ids; so the first of equal candidates is the one with the lowest id.
    """
    highest = peak.amax(dim=0)  # [N]
    total = (mass * (peak - highest).exp()).sum(dim=0)  # [N]
    logits, index = take_best(best.flatten(0, 1).T, k)  # [N, k]
    probs = (logits - highest[:, None]).exp() / total[:, None]
    return Candidates(ids.flatten(0, 1).T.gather(-1, index).long(), probs, total.isnan())


def default_tile(block_n: int, dtype: torch.dtype) -> Tile:
    """Lines of 128 bytes along D; more warps where 128 rows times `block_n` positions would not fit the registers."""
    return Tile(
        vocabulary=128, size=128 // dtype.itemsize, warps=8 if block_n >= 128 else 4, stages=4
    )
