"""The Triton path of `moe.py`: experts for few tokens, with weights as they are or quantised.

For 16 to 128 tokens the time goes to reading the weights of the experts in use, so the kernels are
built around that:

1. `_gate_up_kernel`: for each expert and slice of the inner state, SiLU(gate) · up of the expert's
   tokens.
2. `_down_kernel`: for each expert and slice of the hidden state, the down projection times the
   router's weight.

The outputs of a token are summed by whoever adds them to the residual stream, in their order. There
are no atomics, so results repeat bit for bit.

Which tokens an expert has is listed before (`router_triton.py`), without sorting or padding. The
shared expert, which has all of them, is the first in the grid. Grids depend only on shapes, and no
program looks at an expert without tokens. One with more tokens than a tile holds goes on to the
next tile while its weights are still in the cache.
Quantised weights become numbers in registers. A float32 product is made of three TF32 products,
which run on tensor cores; only the last digits differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.kernels.pdl_triton import begin, launch_options

Stored = tuple[Tensor, Tensor | None, int]
"""Weights as they are stored: numbers, scales if any, and columns of an int4 group (else 0)."""


class Tile(NamedTuple):
    """Work of one program: sizes of its tile, and how the hardware runs it."""

    tokens: int  # at least 16, which is what tensor cores take
    columns: int  # of the output
    depth: int  # of a step along the product; int4 weights take a group for a step
    warps: int = 4
    stages: int = 3


# Triton converts numbers of four and eight bits one by one, which takes longer than reading them.
# These lines of PTX convert two at a time; the interpreter, which has no PTX, takes the plain way.
HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)

# Four e4m3 codes become bfloat16: exponent and fraction move to where bfloat16 has its own, and a
# factor of 2¹²⁰ makes up for the biases. It is exact, for subnormal codes too.
FP8_TO_BF16 = tl.constexpr("""{
.reg .b32 code, sign, factor, zero;
mov.b32 factor, 0x7b807b80;
mov.b32 zero, 0x80008000;
prmt.b32 code, $2, 0, 0x1404;
and.b32 sign, code, 0x80008000;
shr.b32 code, code, 4;
lop3.b32 code, code, 0x07f007f0, sign, 0xea;
fma.rn.bf16x2 $0, code, factor, zero;
prmt.b32 code, $2, 0, 0x3424;
and.b32 sign, code, 0x80008000;
shr.b32 code, code, 4;
lop3.b32 code, code, 0x07f007f0, sign, 0xea;
fma.rn.bf16x2 $1, code, factor, zero;
}""")

# The four codes of each of two int4 words become bfloat16. Below 0x430, four bits are the last ones
# of the number 128 + code, and the code is 8 more than what it stands for.
INT4_TO_BF16 = tl.constexpr("""{
.reg .b32 code, above, one, offset;
mov.b32 above, 0x43004300;
mov.b32 one, 0x3f803f80;
mov.b32 offset, 0xc308c308;
lop3.b32 code, $4, 0x000f000f, above, 0xea;
fma.rn.bf16x2 $0, code, one, offset;
shr.b32 code, $4, 4;
lop3.b32 code, code, 0x000f000f, above, 0xea;
fma.rn.bf16x2 $1, code, one, offset;
shr.b32 code, $4, 8;
lop3.b32 code, code, 0x000f000f, above, 0xea;
fma.rn.bf16x2 $2, code, one, offset;
shr.b32 code, $4, 12;
lop3.b32 code, code, 0x000f000f, above, 0xea;
fma.rn.bf16x2 $3, code, one, offset;
}""")


@triton.jit
def _numbers(stored, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights as numbers of the dtype of the tokens."""
    if HAS_PTX and stored.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        codes = [stored.to(tl.uint8, bitcast=True)]
        return tl.inline_asm_elementwise(FP8_TO_BF16, "=&r,=&r,r", codes, tl.bfloat16, True, 4)
    return stored.to(dtype)


@triton.jit
def _quarters(words, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of four int4 codes as numbers, for each quarter of the group."""
    if HAS_PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            INT4_TO_BF16, "=&r,=&r,=&r,=&r,r", [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    wide = words.to(tl.int32)
    first = ((wide & 15) - 8).to(dtype)
    second = ((wide >> 4 & 15) - 8).to(dtype)
    third = ((wide >> 8 & 15) - 8).to(dtype)
    fourth = ((wide >> 12 & 15) - 8).to(dtype)
    return first, second, third, fourth


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    left, left_row, exists, weight, scale, row, depth,
    SCALED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """left[left_row] · weight[row]ᵀ, [BLOCK_M, BLOCK_N] float32, for weights as they are stored."""
    dtype: tl.constexpr = left.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    left_at = left + left_row.to(tl.int64)[:, None] * depth
    exists = exists[:, None]  # other rows are zero: fetching some would cost as much as the weights
    if GROUP == 0:  # each number has its own storage, and a row has at most one scale
        column = tl.arange(0, BLOCK_K)
        weight_at = weight + row.to(tl.int64)[None, :] * depth + column[:, None]
        for start in range(0, depth, BLOCK_K):
            inside = (start + column < depth) | DIVIDES
            mask = exists & inside[None, :]
            a = tl.load(left_at + (start + column)[None, :], mask, other=0.0)
            mask = inside[:, None]
            b = tl.load(weight_at + start, mask, other=0.0, eviction_policy="evict_first")
            total = tl.dot(a, _numbers(b, dtype), total, input_precision="tf32x3")
        if SCALED:
            total *= tl.load(scale + row)[None, :]
    else:  # a word holds four numbers, one of each quarter of a group; a group has a scale
        quarter: tl.constexpr = GROUP // 4
        block: tl.constexpr = quarter if quarter > 16 else 16  # the shortest product there is
        column = tl.arange(0, block)
        inside = column < quarter
        weight_at = weight + row.to(tl.int64)[None, :] * (depth // GROUP * quarter)
        weight_at += column[:, None]
        for group in range(0, depth // GROUP):
            start = group * quarter
            mask = inside[:, None]
            words = tl.load(weight_at + start, mask, other=0, eviction_policy="evict_first")
            first, second, third, fourth = _quarters(words, dtype)
            a_at = left_at + (group * GROUP + column)[None, :]
            mask = exists & inside[None, :]
            a = tl.load(a_at, mask, other=0.0)
            part = tl.dot(a, first, input_precision="tf32x3")
            a = tl.load(a_at + quarter, mask, other=0.0)
            part = tl.dot(a, second, part, input_precision="tf32x3")
            a = tl.load(a_at + 2 * quarter, mask, other=0.0)
            part = tl.dot(a, third, part, input_precision="tf32x3")
            a = tl.load(a_at + 3 * quarter, mask, other=0.0)
            part = tl.dot(a, fourth, part, input_precision="tf32x3")
            total += part * tl.load(scale + row * (depth // GROUP) + group).to(tl.float32)[None, :]
    return total


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    tokens, weight, scale, shared_gate, shared_up, pairs, experts, counts, active, inner,
    num_tokens, capacity, hidden, width,
    TERMS: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DIVIDES: tl.constexpr,
    SHARED_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`inner` [N * TERMS, I]: SiLU(gate) · up of every pair, and of every token's shared expert."""
    begin(PDL)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_shared = tl.cdiv(num_tokens, BLOCK_M) * SHARED  # tiles of the shared expert come first
    if tl.program_id(1) < num_shared:
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_token = token < num_tokens
        state_row = tl.minimum(column, width - 1)
        gate = _product(
            tokens, token, is_token, shared_gate, scale, state_row, hidden,
            False, 0, BLOCK_M, BLOCK_N, SHARED_K, DIVIDES,
        )  # fmt: skip
        up = _product(
            tokens, token, is_token, shared_up, scale, state_row, hidden,
            False, 0, BLOCK_M, BLOCK_N, SHARED_K, DIVIDES,
        )  # fmt: skip
        _store_state(gate, up, inner, token * TERMS + TERMS - 1, is_token, column, width)
    else:
        # Rows of gate and up alternate, so that one product makes both; registers split them.
        both = tl.arange(0, 2 * BLOCK_N)
        row = tl.minimum(tl.program_id(0) * BLOCK_N + both // 2, width - 1) + (both % 2) * width
        first_place = tl.program_id(1) - num_shared
        for place in range(first_place, tl.load(active), tl.num_programs(1) - num_shared):
            expert = tl.load(experts + place).to(tl.int64)
            count = tl.load(counts + expert)
            for first in range(0, count, BLOCK_M):
                slot = first + tl.arange(0, BLOCK_M)
                is_pair = slot < count
                pair = tl.load(pairs + expert * capacity + slot, mask=is_pair, other=0)
                products = _product(
                    tokens, pair // TERMS, is_pair, weight, scale, expert * 2 * width + row, hidden,
                    SCALED, GROUP, BLOCK_M, 2 * BLOCK_N, BLOCK_K, DIVIDES,
                )  # fmt: skip
                gate, up = tl.split(tl.reshape(products, (BLOCK_M, BLOCK_N, 2)))
                _store_state(gate, up, inner, pair, is_pair, column, width)


@triton.jit
def _store_state(gate, up, inner, pair, is_pair, column, width):  # type: ignore[no-untyped-def]
    """SiLU(gate) · up [BLOCK_M, BLOCK_N] as rows of `inner`."""
    state = gate * tl.sigmoid(gate) * up
    at = inner + pair.to(tl.int64)[:, None] * width + column[None, :]
    inside = is_pair[:, None] & (column < width)[None, :]
    tl.store(at, state.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    inner, weight, scale, shared, routing, pairs, experts, counts, active, out,
    num_tokens, capacity, hidden, width,
    K: tl.constexpr, TERMS: tl.constexpr, SHARED: tl.constexpr,
    SCALED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DIVIDES: tl.constexpr,
    SHARED_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`out` [N * TERMS, D]: the down projections, those of pairs times the router's weight."""
    begin(PDL)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(column, hidden - 1)
    num_shared = tl.cdiv(num_tokens, BLOCK_M) * SHARED
    if tl.program_id(1) < num_shared:
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_token = token < num_tokens
        pair = token * TERMS + TERMS - 1
        total = _product(
            inner, pair, is_token, shared, scale, row, width,
            False, 0, BLOCK_M, BLOCK_N, SHARED_K, DIVIDES,
        )  # fmt: skip
        at = out + pair.to(tl.int64)[:, None] * hidden + column[None, :]
        inside = is_token[:, None] & (column < hidden)[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=inside)
    else:
        first_place = tl.program_id(1) - num_shared
        for place in range(first_place, tl.load(active), tl.num_programs(1) - num_shared):
            expert = tl.load(experts + place).to(tl.int64)
            count = tl.load(counts + expert)
            for first in range(0, count, BLOCK_M):
                slot = first + tl.arange(0, BLOCK_M)
                is_pair = slot < count
                pair = tl.load(pairs + expert * capacity + slot, mask=is_pair, other=0)
                total = _product(
                    inner, pair, is_pair, weight, scale, expert * hidden + row, width,
                    SCALED, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, DIVIDES,
                )  # fmt: skip
                factor_at = routing + pair // TERMS * K + pair % TERMS
                total *= tl.load(factor_at, mask=is_pair, other=0.0).to(tl.float32)[:, None]
                at = out + pair.to(tl.int64)[:, None] * hidden + column[None, :]
                inside = is_pair[:, None] & (column < hidden)[None, :]
                tl.store(at, total.to(out.dtype.element_ty), mask=inside)


def expert_terms(
    tokens: Tensor,
    routing: Any,
    gate_up: Stored,
    down: Stored,
    shared: tuple[Tensor, Tensor, Tensor] | None,
    is_whole: bool,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """`dmax.kernels.moe.expert_terms` on the device of `tokens`.

    Args:
        tokens: [N, D].
        routing: a `router_triton.Routing`.
        gate_up: [E, 2I, D].
        down: [E, D, I].
        shared: gate, up [I, D] and down [D, I] of the shared expert, in the dtype of the tokens.
        is_whole: every token has K pairs; otherwise terms without one are zero.
        tiles: for tuning.
    """
    up_weight, up_scale, up_group = gate_up
    down_weight, down_scale, down_group = down
    weights, pairs, experts, counts, active, terms = routing
    num_tokens, hidden = tokens.shape
    num_experts, doubled_width, _ = up_weight.shape
    width = doubled_width // 2
    tokens = tokens.contiguous()
    num_pairs = weights.numel()
    tiles = tiles or default_tiles(num_pairs, num_experts, tokens.dtype, up_weight.dtype)
    up_tile, down_tile = tiles
    shared_gate, shared_up, shared_down = shared or (tokens, tokens, tokens)
    inner = tokens.new_empty(num_tokens * terms, width)
    new = tokens.new_empty if is_whole else tokens.new_zeros
    out = new(num_tokens, terms, hidden)
    lists = pairs, experts, counts, active
    sizes = num_tokens, pairs.shape[1], hidden, width
    # A block hits fewer experts than it has pairs. If it should hit more than half as many, some
    # programs do the work of two.
    places = min(num_experts, triton.cdiv(num_pairs, 2))
    common = {"TERMS": terms, "SHARED": int(shared is not None)}
    gate_up_kernel: Any = _gate_up_kernel
    down_kernel: Any = _down_kernel
    gate_up_kernel[_grid(up_tile, width, num_tokens * common["SHARED"], places)](
        tokens, up_weight, up_scale, shared_gate, shared_up, *lists, inner, *sizes,
        SCALED=up_scale is not None, GROUP=up_group, **common,
        **launch(up_tile, hidden, up_weight, tokens, rows_of_column=2),
    )  # fmt: skip
    down_kernel[_grid(down_tile, hidden, num_tokens * common["SHARED"], places)](
        inner, down_weight, down_scale, shared_down, weights, *lists, out, *sizes,
        K=weights.shape[1], SCALED=down_scale is not None, GROUP=down_group, **common,
        **launch(down_tile, width, down_weight, tokens),
    )  # fmt: skip
    return out


def _grid(tile: Tile, columns: int, num_shared: int, places: int) -> tuple[int, int]:
    """Programs for tiles of columns, and for tiles of the shared expert before the others."""
    return triton.cdiv(columns, tile.columns), triton.cdiv(num_shared, tile.tokens) + places


def launch(
    tile: Tile, depth: int, weight: Tensor, tokens: Tensor, rows_of_column: int = 1
) -> dict[str, Any]:
    """A tile as arguments of a kernel that multiplies along `depth`.

    A step along the shared expert's weights, which are not quantised and have a row for a column,
    has as many bytes as others, because programs share the bandwidth by what they ask for. It is
    no longer than others, for the shared memory that tokens take. Where there are more tokens,
    products take the time, and registers are short.
    """
    rows = rows_of_column if tile.tokens == 16 else 1
    bytes_of_step = rows * tile.depth * weight.shape[-1] * weight.itemsize // depth
    shared_depth = min(max(bytes_of_step // tokens.itemsize, 16), tile.depth)
    return {
        "BLOCK_M": tile.tokens,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "SHARED_K": shared_depth,
        "DIVIDES": depth % tile.depth == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **launch_options(tokens.device),
    }


def default_tiles(
    num_pairs: int, num_experts: int, tokens: torch.dtype, weight: torch.dtype
) -> tuple[Tile, Tile]:
    """Tiles of the gate and up projections, and of the down projection, by pairs per expert.

    What decides is that enough copies are on their way (140 KiB or more on each multiprocessor of
    an H100, E 256, D 2048, I 512), that no conversion takes longer than reading, and that tokens,
    which every tile of columns reads again, are few beside the weights (15 % at most). A tile of
    fewer warps loads the tokens for more weights. Tiles of int4 have the bytes of others in twice
    their columns. Float32 products take three times the registers, so they keep the smallest tile.
    """
    if tokens == torch.float32:
        return Tile(16, 32, 64), Tile(16, 32, 64)
    is_packed = weight == torch.int16
    if num_pairs <= 8 * num_experts:
        if is_packed:
            return Tile(16, 64, 128, 2, 5), Tile(16, 128, 128, 2, 5)
        if weight.itemsize == 2:
            return Tile(16, 32, 128), Tile(16, 64, 128)
        return Tile(16, 32, 128, 2, 4), Tile(16, 64, 128, 2, 4)
    if is_packed:
        return Tile(32, 64, 128), Tile(32, 32, 128)
    if num_pairs <= 16 * num_experts:
        if weight.itemsize == 2:
            return Tile(32, 32, 128), Tile(32, 32, 128)
        return Tile(32, 64, 128), Tile(32, 64, 128, stages=4)
    return Tile(64, 64, 64), Tile(64, 64, 64)
