"""The Triton path of `lm_head.py`: the best tokens of every tile of the vocabulary.

Every program multiplies a tile of the vocabulary with a tile of the positions and accumulates in
float32. It reduces the logits while they are in registers, to the largest logit, the sum of
exponentials and the k best tokens. For a tile and position it stores 2 k + 2 numbers; there are
1,228 tiles, instead of 157,184 logits. The weights are read once, which is what the time goes to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Work of one program: the sizes of its tile, and how the hardware runs it."""

    vocabulary: int
    size: int  # of a step along D
    warps: int
    stages: int


@triton.jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, best, ids, peak, mass, num_tokens, vocabulary, size, mask_token_id,
    K: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile: `best` and `ids` [T, K, N], `peak` and `mass` [T, N]."""
    # Positions vary fastest, so that programs side by side share weights in the L2 cache.
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    row = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.arange(0, BLOCK_D)
    is_token = token < num_tokens
    is_row = row < vocabulary

    # logits = weight · hiddenᵀ, [BLOCK_V, BLOCK_N]: tensor cores want 64 rows or more.
    weight_at = weight + row.to(tl.int64)[:, None] * size + column[None, :]
    hidden_at = hidden + token[None, :] * size + column[:, None]
    logits = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_D):
        inside = start + column < size
        rows = tl.load(weight_at + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        tokens = tl.load(hidden_at + start, mask=inside[:, None] & is_token[None, :], other=0.0)
        logits = tl.dot(rows, tokens, logits, input_precision="ieee")
    rounded = logits.to(weight.dtype.element_ty)  # as a model that returns logits rounds them
    logits = rounded.to(tl.float32)

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
        is_taken = tl.arange(0, BLOCK_V)[:, None] == index[None, :]
        finite = tl.where(is_taken, float("-inf"), finite)


def top_k_of_tiles(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    mask_token_id: int,
    largest: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best tokens of T tiles of the vocabulary, for `dmax.kernels.lm_head.merge_tiles`.

    Args:
        hidden: [N, D] float32, float16 or bfloat16.
        weight: [V, D] in the same dtype.
        k: candidates, at most V - 1 and few.
        mask_token_id: MASK, never a candidate.
        largest: what infinite logits are clamped to.
        tile: another tile than `default_tile`, for tuning.
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
        hidden.contiguous(), weight.contiguous(), best, ids, peak, mass,
        num_tokens, vocabulary, size, mask_token_id,
        K=k, LARGEST=largest, BLOCK_V=tile.vocabulary, BLOCK_N=block_n, BLOCK_D=tile.size,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return best, ids, peak, mass


def default_tile(block_n: int, dtype: torch.dtype) -> Tile:
    """Lines of 128 bytes along D; more warps where four have too few registers for a tile."""
    warps = 8 if block_n >= 128 else 4
    return Tile(vocabulary=128, size=128 // dtype.itemsize, warps=warps, stages=4)
