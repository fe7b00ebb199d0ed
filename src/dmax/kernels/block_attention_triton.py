"""The Triton path of `block_attention.py`: three kernels, from projected heads to mixed values.

PyTorch would copy each sequence's keys and values out of the cache and repeat them for the heads
that share them. Norms, rotation and writing would take some twenty small kernels in each layer.
Here three kernels do it all:

1. `_prepare_kernel` norms and rotates queries and keys, and writes keys and values into the cache.
2. `_attend_kernel` lets all queries of a row that use one key/value head attend to a share of its
   keys.
3. `_merge_kernel` puts the shares together.

Grids depend only on shapes and the GPU. How far a row reads the cache, and in how many shares, is
found on the device from the row's own base, so no kernel is compiled anew as a sequence grows, and
programs without a share end at once. Everything is computed in float32, with products of 16-bit
numbers.

Shapes: R rows (blocks) of L positions, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.kernels.pdl_triton import begin, launch_options

SHARES = 16  # merged at a time
FEWEST = 64  # keys of a share
PLACES = ("slots", "starts", "bases")  # views into one tensor, whose alignment varies with the rows


class Tile(NamedTuple):
    """Work of one program: the sizes of its tile, and how the hardware runs it."""

    queries: int  # held at most
    keys: int  # read in a step
    warps: int
    stages: int
    at_once: int = 2  # programs that a multiprocessor runs


@triton.jit(do_not_specialize=PLACES)
def _prepare_kernel(  # type: ignore[no-untyped-def]
    heads, query_weight, key_weight, cos, sin, slots, starts, bases, query, keys, values,
    length, capacity, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Bring one head at one position of `heads` into `query` [R, L, H, d] or into the cache."""
    begin(PDL)
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
        partner = (column + ROTARY // 2) % ROTARY  # the column that this one rotates with
        other = tl.load(source + partner, mask=rotates, other=0.0).to(tl.float32)
        wide *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        other *= tl.load(weight + partner, mask=rotates, other=0.0).to(tl.float32)
        angle = (tl.load(bases + at // length) + at % length) * ROTARY + column
        c = tl.load(cos + angle, mask=rotates, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=rotates, other=0.0).to(tl.float32)
        turned = (scale * (wide * c + other * s)).to(x.dtype)
        if head < H:
            tl.store(query + (at.to(tl.int64) * H + head) * D + column, turned, mask=inside)
        else:
            tl.store(keys + place + (head - H) * D, turned, mask=inside)


@triton.jit
def _num_shares(base, length, most, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Shares of the keys of a row: at most `most`, each of LEAST keys or more, at least one."""
    return tl.minimum(most, tl.maximum((base + length) // LEAST, 1)).to(tl.int32)


@triton.jit(do_not_specialize=PLACES)
def _attend_kernel(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, bases, out, parts, peak, mass, scaling, capacity, length,
    SHARE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, LEAST: tl.constexpr, PDL: tl.constexpr,
    TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend to a share of a row's keys; of n shares, each has every n-th tile of them.

    A single one is stored in `out` [R, L, H, d]; several, not yet divided, are in `parts` [shares,
    R, L, H, d]. The queries of a row that share keys are in TILES tiles.
    """
    begin(PDL)
    row = tl.program_id(0)
    kv_head = tl.program_id(1) // TILES
    split = tl.program_id(2)
    base = tl.load(bases + row).to(tl.int32)
    shares = _num_shares(base, length, tl.num_programs(2), LEAST)
    if split >= shares:
        return
    start = tl.load(starts + row).to(tl.int32)
    store = tl.load(slots + row) * capacity * (G * D) + kv_head * D
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    # The SHARE heads of a position, then those of the next.
    each = tl.program_id(1) % TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = each < length * SHARE
    position_at = (row * length + each // SHARE).to(tl.int64)
    head = position_at * (G * SHARE) + kv_head * SHARE + each % SHARE
    q_at = query + head[:, None] * D + column[None, :]
    is_output = is_query[:, None] & inside[None, :]
    q = tl.load(q_at, mask=is_output, other=0.0)

    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    mixed = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    # Tiles of the positions before the block come first, then those of the block itself.
    num_before = tl.cdiv(base, BLOCK_S)
    for tile in range(split, num_before + tl.cdiv(length, BLOCK_S), shares):
        is_own = tile >= num_before
        first = tl.where(is_own, start + (tile - num_before) * BLOCK_S, tile * BLOCK_S)
        position = first + tl.arange(0, BLOCK_S)
        seen = position < tl.where(is_own, start + length, base)
        at = position * (G * D)
        k_at = keys + store + (at[None, :] + column[:, None])
        v_at = values + store + (at[:, None] + column[None, :])
        k = tl.load(k_at, mask=seen[None, :] & inside[:, None], other=0.0)
        v = tl.load(v_at, mask=seen[:, None] & inside[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="tf32x3") * (scaling * 1.4426950408889634)  # to base 2
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))  # a tile has a key that is seen
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(share, axis=1)
        mixed = tl.dot(share.to(v.dtype), v, mixed * fade[:, None], input_precision="tf32x3")
        highest = higher
    if shares == 1:
        tl.store(out + head[:, None] * D + column[None, :], mixed / total[:, None], mask=is_output)
    else:
        at = (split * tl.num_programs(0) * length * (G * SHARE)).to(tl.int64) + head
        tl.store(parts + at[:, None] * D + column[None, :], mixed, mask=is_output)
        tl.store(peak + at, highest, mask=is_query)
        tl.store(mass + at, total, mask=is_query)


@triton.jit(do_not_specialize=("bases", "most"))
def _merge_kernel(  # type: ignore[no-untyped-def]
    parts, peak, mass, bases, out, length, most,
    H: tl.constexpr, D: tl.constexpr, LEAST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the shares of one head at one position, BLOCK at a time, where there are several."""
    begin(PDL)
    at = tl.program_id(0).to(tl.int64)
    shares = _num_shares(tl.load(bases + at // (length * H)), length, most, LEAST)
    if shares == 1:
        return
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    highest = float("-inf")
    total = 0.0
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, shares, BLOCK):
        split = first + tl.arange(0, BLOCK)
        part = split.to(tl.int64) * tl.num_programs(0) + at
        is_part = split < shares
        peaks = tl.load(peak + part, mask=is_part, other=float("-inf"))
        masses = tl.load(mass + part, mask=is_part, other=0.0)
        mixed_at = parts + part[:, None] * D + column[None, :]
        mixes = tl.load(mixed_at, mask=is_part[:, None] & inside[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(peaks, axis=0))
        weight = tl.exp2(peaks - higher)
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weight * masses, axis=0)
        mixed = mixed * fade + tl.sum(weight[:, None] * mixes, axis=0)
        highest = higher
    tl.store(out + at * D + column, (mixed / total).to(out.dtype.element_ty), mask=inside)


def block_attention(
    heads: Tensor,
    norms: tuple[Tensor, Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    bases: Tensor,
    scaling: float,
    tile: Tile | None = None,
) -> Tensor:
    """`dmax.kernels.block_attention.block_attention` on the device of `heads`.

    Args:
        heads: [R, L, H + 2 G, d], likewise norms, eps, rotary and scaling.
        norms: see there.
        eps: see there.
        rotary: see there.
        keys: [slots, T, G, d], a layer's store in the cache, which is written to.
        values: [slots, T, G, d], likewise.
        slots: [R] int64, the slot of each row.
        starts: [R] int64, where each row is written.
        bases: [R] int64, how many positions each row sees besides itself.
        scaling: what scores are multiplied with.
        tile: another tile than `default_tile`, for tuning.
    """
    places = slots.contiguous(), starts.contiguous(), bases.contiguous()
    query = _prepare(heads.contiguous(), norms, eps, rotary, keys, values, *places)
    tile = tile or default_tile(query.dtype)
    return _attend(query, keys, values, *places, scaling, tile)


def _prepare(
    heads: Tensor,
    norms: tuple[Tensor, Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    bases: Tensor,
) -> Tensor:
    """Write keys and values into the cache; returns the queries [R, L, H, d] to attend with."""
    num_rows, length, _, size = heads.shape
    capacity = keys.shape[1]
    num_shared = keys.shape[2]
    num_heads = heads.shape[2] - 2 * num_shared
    cos, sin = rotary
    query = heads.new_empty(num_rows, length, num_heads, size)
    prepare: Any = _prepare_kernel
    prepare[num_rows * length, num_heads + 2 * num_shared](
        heads, *norms, cos, sin, slots, starts, bases, query, keys, values, length, capacity, eps,
        H=num_heads, G=num_shared, D=size, ROTARY=cos.shape[-1],
        BLOCK_D=triton.next_power_of_2(size), num_warps=1, **launch_options(heads.device),
    )  # fmt: skip
    return query


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    bases: Tensor,
    scaling: float,
    tile: Tile,
) -> Tensor:
    """Attend in shares of the keys, and put these together: [R, L, H d]."""
    num_rows, length, num_heads, size = query.shape
    capacity = keys.shape[1]
    num_shared = keys.shape[2]
    exact_d = triton.next_power_of_2(size)
    num_queries = length * num_heads // num_shared
    block_q = min(tile.queries, max(16, triton.next_power_of_2(num_queries)))
    tiles = triton.cdiv(num_queries, block_q)
    most = max_shares(num_rows * num_shared * tiles, tile.at_once * multiprocessors(query.device))
    least = keys_of_a_share(num_queries, size, keys.itemsize)
    out = query.new_empty(num_rows, length, num_heads * size)
    places = (most, num_rows, length, num_heads) if most > 1 else (0,)
    parts = query.new_empty(*places, size, dtype=torch.float32)
    peak = query.new_empty(places, dtype=torch.float32)
    mass = query.new_empty(places, dtype=torch.float32)
    attend: Any = _attend_kernel
    attend[num_rows, num_shared * tiles, most](
        query, keys, values, slots, starts, bases, out, parts, peak, mass,
        scaling, capacity, length,
        SHARE=num_heads // num_shared, G=num_shared, D=size, LEAST=least, TILES=tiles,
        BLOCK_Q=block_q, BLOCK_S=tile.keys, BLOCK_D=max(16, exact_d),
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(query.device),
    )  # fmt: skip
    if most > 1:
        merge: Any = _merge_kernel
        merge[(num_rows * length * num_heads,)](
            parts, peak, mass, bases, out, length, most,
            H=num_heads, D=size, LEAST=least, BLOCK=SHARES, BLOCK_D=exact_d, num_warps=1,
            **launch_options(query.device),
        )  # fmt: skip
    return out


def default_tile(dtype: torch.dtype) -> Tile:
    """A tile of which a multiprocessor of an H100 holds two (178 registers, 113 KiB).

    With all 128 queries of a head that others share in one program, the two tiles of eight warps
    would have as much to do as two programs here, wait for each other, and leave every second
    multiprocessor idle where contexts are short. Keys and values are read twice, once from the
    cache of the GPU. Float32 takes twice the shared memory for half the keys.
    """
    return Tile(64, 64, 4, 3) if dtype.itemsize == 2 else Tile(64, 32, 4, 2, at_once=1)


def max_shares(num_programs: int, at_once: int) -> int:
    """How many shares the keys are divided into at most: all programs run at the same time.

    With more programs there are fewer shares, which are summed in another order. So other rows
    change the last bits of a result, as they do in PyTorch's own products on a GPU.
    """
    return max(1, at_once // num_programs)


def keys_of_a_share(num_queries: int, size: int, itemsize: int) -> int:
    """So many keys that they and their values take no fewer bytes than the share's results.

    Args:
        num_queries: that share keys, each with `size` sums, a maximum and a total in float32.
        size: of a head.
        itemsize: bytes of a number in the cache.
    """
    return max(FEWEST, triton.cdiv(num_queries * (size + 2) * 4, 2 * size * itemsize))


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where there is none, as many as an H100 has."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
