"""The Triton path of `block_attention.py`. Importing this imports triton.

PyTorch would copy each sequence's keys and values out of the cache, repeat them for the heads that
share them, and take some twenty small kernels a layer for norms, rotation and writing. Here three
do it all:

1. `_prepare_kernel`: norms and rotates queries and keys, and writes keys and values into the cache,
2. `_attend_kernel`: of each row and key/value head, a share of the keys for all queries of its
    group of heads,
3. `_merge_kernel`: puts the shares together.

Grids depend on shapes alone; how far the cache is read is a number on the device. Everything is
computed in float32, products from 16 bits. R rows (blocks) of L positions, H query heads, G
key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.cache import CacheWindow

PROGRAMS = 256  # that are wanted at once, about two for each multiprocessor of a large GPU
KEYS = 64  # that a program reads in a step
QUERIES = 128  # that a program holds at most


@triton.jit
def _prepare_kernel(  # type: ignore[no-untyped-def]
    heads, query_weight, key_weight, cos, sin, slots, starts, query, keys, values, length, capacity, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head at one position: of `heads` [R, L, H + 2 G, d] into `query` [R, L, H, d] or the cache."""
    at = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    rotates = column < ROTARY
    source = heads + (at.to(tl.int64) * (H + 2 * G) + head) * D
    x = tl.load(source + column, mask=inside, other=0.0)
    slot = tl.load(slots + at // length)
    position = tl.load(starts + at // length) + at % length
    place = (slot * capacity + position) * G * D + column
    if head >= H + G:
        tl.store(values + place + (head - H - G) * D, x, mask=inside)
    else:
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide) / D + eps)
        weight = query_weight if head < H else key_weight
        partner = (column + ROTARY // 2) % ROTARY  # of the halves that rotate together
        other = tl.load(source + partner, mask=rotates, other=0.0).to(tl.float32)
        wide *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        other *= tl.load(weight + partner, mask=rotates, other=0.0).to(tl.float32)
        c = tl.load(cos + at * ROTARY + column, mask=rotates, other=1.0).to(tl.float32)
        s = tl.load(sin + at * ROTARY + column, mask=rotates, other=0.0).to(
            tl.float32
        )  # with its sign
        turned = (scale * (wide * c + other * s)).to(x.dtype)
        if head < H:
            tl.store(query + (at.to(tl.int64) * H + head) * D + column, turned, mask=inside)
        else:
            tl.store(keys + place + (head - H) * D, turned, mask=inside)


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, bases, out, peak, mass, scaling, capacity, length,
    SHARE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every SPLITS-th tile of the keys that a row sees; `out` [SPLITS, R, L, H, d] float32, not yet divided.

    The queries of a row that share keys are in TILES tiles.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1) // TILES
    split = tl.program_id(2)
    slot = tl.load(slots + row)
    start = tl.load(starts + row)
    base = tl.load(bases + row)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    # The SHARE heads of a position, then those of the next.
    each = tl.program_id(1) % TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    asks = each < length * SHARE
    head = (
        (row * length + each // SHARE).to(tl.int64) * (G * SHARE) + kv_head * SHARE + each % SHARE
    )
    q = tl.load(
        query + head[:, None] * D + column[None, :], mask=asks[:, None] & inside[None, :], other=0.0
    )

    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    mixed = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    store = slot * capacity
    num_before = tl.cdiv(
        base, BLOCK_S
    )  # tiles of what stands before the block; then those of the block itself
    for tile in range(split, num_before + tl.cdiv(length, BLOCK_S), SPLITS):
        is_own = tile >= num_before
        first = tl.where(is_own, start + (tile - num_before) * BLOCK_S, tile * BLOCK_S)
        position = first + tl.arange(0, BLOCK_S)
        seen = position < tl.where(is_own, start + length, base)
        at = ((store + position) * G + kv_head) * D
        k = tl.load(
            keys + at[None, :] + column[:, None], mask=seen[None, :] & inside[:, None], other=0.0
        )
        v = tl.load(
            values + at[:, None] + column[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        )
        score = tl.dot(q, k, input_precision="tf32x3") * (scaling * 1.4426950408889634)  # to base 2
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))  # of a tile at least one key is seen
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(share, axis=1)
        mixed = tl.dot(share.to(v.dtype), v, mixed * fade[:, None], input_precision="tf32x3")
        highest = higher
    at = (split * tl.num_programs(0) * length * (G * SHARE)).to(tl.int64) + head
    tl.store(out + at[:, None] * D + column[None, :], mixed, mask=asks[:, None] & inside[None, :])
    tl.store(peak + at, highest, mask=asks)
    tl.store(mass + at, total, mask=asks)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    parts, peak, mass, out, num_heads,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head at one position of `num_heads` in all."""
    at = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    part = split.to(tl.int64) * num_heads + at
    highest = tl.load(peak + part, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp2(highest - tl.max(highest, axis=0))
    total = tl.sum(weight * tl.load(mass + part, mask=split < SPLITS, other=0.0), axis=0)
    mixed = tl.load(
        parts + part[:, None] * D + column[None, :],
        mask=(split < SPLITS)[:, None] & inside[None, :],
        other=0.0,
    )
    result = tl.sum(weight[:, None] * mixed, axis=0) / total
    tl.store(out + at * D + column, result.to(out.dtype.element_ty), mask=inside)


def block_attention(
    heads: Tensor,
    norms: tuple[Tensor, Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor],
    window: CacheWindow,
    layer: int,
    scaling: float,
) -> Tensor:
    """`dmax.kernels.block_attention.block_attention` on the device of `heads`."""
    num_rows, length, num_heads, size = heads.shape
    keys = window.cache.keys[layer]
    values = window.cache.values[layer]
    capacity = keys.shape[1]
    shared = keys.shape[2]
    num_heads -= 2 * shared
    cos, sin = (each.contiguous() for each in rotary)
    heads = heads.contiguous()
    block_d = max(16, triton.next_power_of_2(size))
    assert window.bases is not None, "see `can_attend`"
    slots, starts, bases = (
        each.contiguous() for each in (window.slots, window.starts, window.bases)
    )

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=heads.device)

    query = new(num_rows, length, num_heads, size, dtype=heads.dtype)
    prepare: Any = _prepare_kernel
    prepare[num_rows * length, num_heads + 2 * shared](
        heads, *norms, cos, sin, slots, starts, query, keys, values, length, capacity, eps,
        H=num_heads, G=shared, D=size, ROTARY=cos.shape[-1], BLOCK_D=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    queries = length * num_heads // shared
    block_q = min(QUERIES, max(16, triton.next_power_of_2(queries)))
    tiles = triton.cdiv(queries, block_q)
    splits = num_splits(num_rows * shared * tiles, window.span)
    parts = new(splits, num_rows, length, num_heads, size)
    peak = new(splits, num_rows, length, num_heads)
    mass = new(splits, num_rows, length, num_heads)
    attend: Any = _attend_kernel
    attend[num_rows, shared * tiles, splits](
        query, keys, values, slots, starts, bases, parts, peak, mass, scaling, capacity, length,
        SHARE=num_heads // shared, G=shared, D=size, SPLITS=splits, TILES=tiles, BLOCK_Q=block_q, BLOCK_S=KEYS,
        BLOCK_D=block_d, num_warps=8 if block_q >= 128 else 4, num_stages=2,
    )  # fmt: skip
    out = new(num_rows, length, num_heads * size, dtype=heads.dtype)
    merge: Any = _merge_kernel
    merge[(num_rows * length * num_heads,)](
        parts, peak, mass, out, num_rows * length * num_heads,
        D=size, SPLITS=splits, BLOCK_SPLITS=triton.next_power_of_2(splits), BLOCK_D=triton.next_power_of_2(size),
        num_warps=1,
    )  # fmt: skip
    return out


def num_splits(num_programs: int, span: int) -> int:
    """Into how many shares the keys go, so that there is work for the whole GPU and a tile for every share.

    More programs mean fewer shares, which are summed in another order: other rows change the last
    bits of a result, as they do in PyTorch's own products on a GPU.
    """
    tiles = span // KEYS + 1
    return max(1, min(tiles, PROGRAMS // num_programs))
