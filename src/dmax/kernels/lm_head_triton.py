"""The Triton path of `lm_head.py`: the best tokens of every tile of the vocabulary, then of all.

Every program multiplies a tile of the vocabulary with a tile of the positions and accumulates in
float32. It reduces the logits while they are in registers, to the largest logit, the sum of
exponentials and the k best tokens. With noise (`dmax.confidence`) the first of the k is the one
whose noisy logit is largest. For a tile and position it stores 2 k + 3 numbers; there are 1,228
tiles, instead of 157,184 logits. The weights are read once, which is what the time goes to. Another
kernel merges the tiles.

N positions, T tiles, k candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.kernels.pdl_triton import begin, launch_options

MAX_POSITIONS = 64  # of a tile; with twice as many, noise and candidates take all registers


class Tiles(NamedTuple):
    """What the tiles hold of every position.

    Attributes:
        best: [N, T, k] float32 logits; the first is that of the drawn token, if there is noise, and
            the others descend.
        ids: [N, T, k] int32, their tokens.
        score: [N, T] float32, the first logit with its noise.
        peak: [N, T] float32, the highest logit, MASK's included.
        mass: [N, T] float32, the sum of exp(logit - peak).
    """

    best: Tensor
    ids: Tensor
    score: Tensor
    peak: Tensor
    mass: Tensor


class Tile(NamedTuple):
    """Work of one program: the sizes of its tile, and how the hardware runs it."""

    vocabulary: int
    size: int  # of a step along D
    warps: int
    stages: int


@triton.jit
def _gumbel(  # type: ignore[no-untyped-def]
    seed, position, step, first, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Noise [BLOCK_V, BLOCK_N] float32 of the tokens from `first` on, a multiple of 4.

    `seed`, `position` and `step` [BLOCK_N] int64.
    """
    position = position.to(tl.int32)
    step = step.to(tl.int32)
    fours = first // 4 + tl.arange(0, BLOCK_V // 4)
    a, b, c, d = tl.philox(seed[None, :], fours[:, None], position[None, :], step[None, :], 0)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCK_V / 4, BLOCK_N, 2, 2]
    words = tl.permute(tl.reshape(words, (BLOCK_V // 4, BLOCK_N, 4)), (0, 2, 1))
    u = (tl.reshape(words, (BLOCK_V, BLOCK_N)).to(tl.float32) + 0.5) * 2.0**-32
    u = tl.minimum(u, 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    exponential = tl.where(u < 2.0**-6, series, -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["starts"])
def _tile_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, best, ids, score, peak, mass,
    seeds, temperatures, starts, steps, first, length, num_tokens, vocabulary, size, mask_token_id,
    NOISY: tl.constexpr, K: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile: `best` and `ids` [N, T, K], `score`, `peak` and `mass` [N, T]."""
    begin(PDL)
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
    at = token * tl.num_programs(1) + tile
    tl.store(peak + at, highest, mask=is_token)
    tl.store(mass + at, tl.sum(shares, axis=0), mask=is_token)

    finite = tl.where((row == mask_token_id)[:, None], float("-inf"), finite)
    value, index = _first(finite)
    drawn = value
    if NOISY:
        block = (first + token) // length
        temperature = tl.load(temperatures + block, mask=is_token, other=0.0)
        if tl.max(temperature, axis=0) > 0:
            seed = tl.load(seeds + block, mask=is_token, other=0)
            position = tl.load(starts + block, mask=is_token, other=0) + (first + token) % length
            step = tl.load(steps + block, mask=is_token, other=0)
            noise = _gumbel(seed, position, step, tile * BLOCK_V, BLOCK_V, BLOCK_N)
            drawn, index = _first(finite + temperature[None, :] * noise)
            value = tl.max(tl.where(_is_at(index, BLOCK_V), finite, float("-inf")), axis=0)
    tl.store(score + at, drawn, mask=is_token)
    for rank in tl.static_range(K):
        tl.store(best + at * K + rank, value, mask=is_token)
        tl.store(ids + at * K + rank, tile * BLOCK_V + index, mask=is_token)
        if rank + 1 < K:
            finite = tl.where(_is_at(index, BLOCK_V), float("-inf"), finite)
            value, index = _first(finite)


@triton.jit
def _first(values):  # type: ignore[no-untyped-def]
    """The largest value of each column, and the first row that has it."""
    return tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _is_at(index, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_V, BLOCK_N] bool, whether a row is the one that its column names."""
    return tl.arange(0, BLOCK_V)[:, None] == index[None, :]


@triton.jit
def _merge_tiles_kernel(  # type: ignore[no-untyped-def]
    best, ids, score, peak, mass, tokens, probs, broken, num_tiles,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One position: `tokens` and `probs` [N, K], `broken` [N]."""
    begin(PDL)
    position = tl.program_id(0)
    tile = tl.arange(0, BLOCK_T)
    at = position * num_tiles + tile
    is_tile = tile < num_tiles
    peaks = tl.load(peak + at, mask=is_tile, other=float("-inf"))
    highest = tl.max(peaks, axis=0)
    masses = tl.load(mass + at, mask=is_tile, other=0.0)
    total = tl.sum(masses * tl.exp(peaks - highest), axis=0)
    tl.store(broken + position, total != total)

    scores = tl.load(score + at, mask=is_tile, other=float("-inf"))
    first = (position * num_tiles + tl.argmax(scores, axis=0, tie_break_left=True)) * K
    value = tl.load(best + first)
    token = tl.load(ids + first)
    candidate = tl.arange(0, BLOCK_C)
    at = position * num_tiles * K + candidate
    is_candidate = candidate < num_tiles * K
    values = tl.load(best + at, mask=is_candidate, other=float("-inf"))
    others = tl.load(ids + at, mask=is_candidate, other=0)
    for rank in tl.static_range(K):
        tl.store(tokens + position * K + rank, token.to(tl.int64))
        tl.store(probs + position * K + rank, tl.exp(value - highest) / total)
        if rank + 1 < K:
            values = tl.where(others == token, float("-inf"), values)
            value = tl.max(values, axis=0)
            token = tl.min(tl.where(values == value, others, 2147483647), axis=0)


def top_k_of_tiles(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    mask_token_id: int,
    largest: float,
    noise: Any = None,
    tile: Tile | None = None,
) -> Tiles:
    """The best tokens of T tiles of the vocabulary.

    Args:
        hidden: [N, D] float32, float16 or bfloat16.
        weight: [V, D] in the same dtype.
        k: candidates, at most V - 1 and few.
        mask_token_id: MASK, never a candidate.
        largest: what infinite logits are clamped to.
        noise: `GumbelNoise` of the positions; None: there is none.
        tile: another tile than `default_tile`, for tuning.
    """
    num_tokens, size = hidden.shape
    vocabulary = weight.shape[0]
    block_n = positions_of_tile(num_tokens)
    tile = tile or default_tile(block_n, weight.dtype)
    num_tiles = triton.cdiv(vocabulary, tile.vocabulary)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(num_tokens, num_tiles, *shape, dtype=dtype, device=hidden.device)

    tiles = Tiles(best=new(k), ids=new(k, dtype=torch.int32), score=new(), peak=new(), mass=new())
    kernel: Any = _tile_kernel
    kernel[triton.cdiv(num_tokens, block_n), num_tiles](
        hidden.contiguous(), weight.contiguous(), *tiles, *_of_blocks(noise),
        num_tokens, vocabulary, size, mask_token_id,
        NOISY=noise is not None, K=k, LARGEST=largest,
        BLOCK_V=tile.vocabulary, BLOCK_N=block_n, BLOCK_D=tile.size,
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(hidden.device),
    )  # fmt: skip
    return tiles


def merge(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates of the whole vocabulary from those of its tiles."""
    num_tokens, num_tiles, k = tiles.best.shape
    tokens = torch.empty(num_tokens, k, dtype=torch.int64, device=tiles.best.device)
    probs = torch.empty_like(tokens, dtype=torch.float32)
    broken = torch.empty_like(tokens[:, 0], dtype=torch.bool)
    kernel: Any = _merge_tiles_kernel
    kernel[(num_tokens,)](
        *tiles, tokens, probs, broken, num_tiles,
        K=k,
        BLOCK_T=triton.next_power_of_2(num_tiles),
        BLOCK_C=triton.next_power_of_2(num_tiles * k),
        num_warps=4 if k < 4 else 8,
        **launch_options(tokens.device),
    )  # fmt: skip
    return tokens, probs, broken


def positions_of_tile(num_tokens: int) -> int:
    """Of so many positions, those that a tile has; tensor cores take 16 or more."""
    return min(MAX_POSITIONS, max(16, triton.next_power_of_2(num_tokens)))


def default_tile(block_n: int, dtype: torch.dtype) -> Tile:
    """Lines of 128 bytes along D; more warps where four have too few registers for a tile."""
    warps = 8 if block_n >= MAX_POSITIONS else 4
    return Tile(vocabulary=128, size=128 // dtype.itemsize, warps=warps, stages=4)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["starts"])
def _add_noise_kernel(  # type: ignore[no-untyped-def]
    values, out, seeds, temperatures, starts, steps, first, length, vocabulary,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`out` = `values` [N, V] with noise; the blocks' rows are [B]."""
    index = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = index.to(tl.int64) * vocabulary + token
    value = tl.load(values + at, mask=token < vocabulary)
    block = (first + index) // length
    temperature = tl.load(temperatures + block)
    if temperature > 0:
        one = tl.arange(0, 1)
        seed = tl.load(seeds + block + one)
        position = tl.load(starts + block + one) + (first + index) % length
        step = tl.load(steps + block + one)
        noise = _gumbel(seed, position, step, tl.program_id(1) * BLOCK_V, BLOCK_V, 1)
        noisy = value.to(tl.float32) + temperature * tl.reshape(noise, (BLOCK_V,))
        value = noisy.to(value.dtype)
    tl.store(out + at, value, mask=token < vocabulary)


def add_noise(values: Tensor, noise: Any) -> Tensor:
    """Values [..., V] with the noise of the next positions, as `GumbelNoise.added_to`."""
    values = values.contiguous()
    out = torch.empty_like(values)
    vocabulary = values.shape[-1]
    kernel: Any = _add_noise_kernel
    kernel[values.shape[:-1].numel(), triton.cdiv(vocabulary, 1024)](
        values, out, *_of_blocks(noise), vocabulary, BLOCK_V=1024,
    )  # fmt: skip
    return out


def _of_blocks(noise: Any) -> tuple[Tensor | int | None, ...]:
    """What kernels read of the noise: four tensors [B], the first position, and L."""
    if noise is None:
        return None, None, None, None, 0, 1
    tensors = (noise.seeds, noise.temperatures, noise.starts.contiguous(), noise.steps)
    return *tensors, noise.first, noise.block_length
