"""The Triton path of `moe.py`: experts for few tokens, with weights as they are or quantised.

For 16 to 128 tokens the time goes to reading the weights of the experts in use, so the kernels are
built around that:

1. `_route_kernel`: one program for each expert lists its pairs. There is no sorting and no padding.
2. `_gate_up_kernel`: for each expert and slice of the inner state, SiLU(gate) · up of the expert's
   tokens.
3. `_down_kernel`: for each expert and slice of the hidden state, the down projection times the
   router's weight.
4. A sum over the K outputs of each token, in their order. There are no atomics, so results repeat
   bit for bit.

Grids depend only on shapes. A program whose expert has no token reads one number and ends. One with
more tokens than a tile holds goes on to the next tile while its weights are still in the cache.
Quantised weights become numbers in registers. A float32 product is made of three TF32 products,
which run on tensor cores; only the last digits differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Stored = tuple[Tensor, Tensor | None, int]
"""Weights as they are stored: numbers, scales if any, and columns of an int4 group (else 0)."""


class Tile(NamedTuple):
    """Work of one program: sizes of its tile, and how the hardware runs it."""

    tokens: int  # at least 16, which is what tensor cores take
    columns: int  # of the output
    depth: int  # of a step along the product; int4 weights take a group for a step
    warps: int = 4
    stages: int = 3


@triton.jit
def _route_kernel(  # type: ignore[no-untyped-def]
    index, pairs, counts, num_pairs, BLOCK: tl.constexpr
):
    """List one expert's pairs in order: the first `counts` [E] numbers of `pairs` [E, N * K]."""
    expert = tl.program_id(0)
    found = tl.zeros((), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        is_mine = tl.load(index + pair, mask=pair < num_pairs, other=-1) == expert
        slot = found + tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        tl.store(pairs + expert * num_pairs + slot, pair, mask=is_mine)
        found += tl.sum(is_mine.to(tl.int32), axis=0)
    tl.store(counts + expert, found)


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
    tokens, weight, scale, pairs, counts, inner, num_pairs, hidden, width,
    K: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """`inner` [N * K, I]: SiLU(gate) · up of every pair."""
    expert = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + expert)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows of gate and up alternate, so that one product makes both; they are split in registers.
    both = tl.arange(0, 2 * BLOCK_N)
    row = tl.minimum(tl.program_id(0) * BLOCK_N + both // 2, width - 1) + (both % 2) * width
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        pair = tl.load(pairs + expert * num_pairs + slot, mask=slot < count, other=0)
        products = _product(
            tokens, pair // K, slot < count, weight, scale, expert * 2 * width + row, hidden,
            SCALED, GROUP, BLOCK_M, 2 * BLOCK_N, BLOCK_K, DIVIDES,
        )  # fmt: skip
        gate, up = tl.split(tl.reshape(products, (BLOCK_M, BLOCK_N, 2)))
        inside = (slot < count)[:, None] & (column < width)[None, :]
        state = gate * tl.sigmoid(gate) * up
        at = inner + pair.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(at, state.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    inner, weight, scale, routing, pairs, counts, out, num_pairs, hidden, width,
    SCALED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """`out` [N * K, D]: the down projection of every pair, times its weight from the router."""
    expert = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + expert)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = expert * hidden + tl.minimum(column, hidden - 1)
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        pair = tl.load(pairs + expert * num_pairs + slot, mask=slot < count, other=0)
        total = _product(
            inner, pair, slot < count, weight, scale, row, width,
            SCALED, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, DIVIDES,
        )  # fmt: skip
        total *= tl.load(routing + pair).to(tl.float32)[:, None]
        inside = (slot < count)[:, None] & (column < hidden)[None, :]
        at = out + pair.to(tl.int64)[:, None] * hidden + column[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=inside)


def fused_moe(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Stored,
    down: Stored,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """`dmax.kernels.moe.fused_moe` on the device of `tokens`; `tiles` are for tuning."""
    up_weight, up_scale, up_group = gate_up
    down_weight, down_scale, down_group = down
    num_tokens, hidden = tokens.shape
    num_experts, doubled_width, _ = up_weight.shape
    width = doubled_width // 2
    num_pairs = index.numel()
    tokens = tokens.contiguous()
    index = index.contiguous()
    weights = weights.contiguous()
    tiles = tiles or default_tiles(num_pairs, num_experts, tokens.dtype, up_weight.dtype)
    up_tile, down_tile = tiles

    def new(*shape: int, dtype: torch.dtype = tokens.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    pairs = new(num_experts, num_pairs, dtype=torch.int32)
    counts = new(num_experts, dtype=torch.int32)
    inner = new(num_pairs, width)
    out = new(num_pairs, hidden)
    route: Any = _route_kernel
    gate_up_kernel: Any = _gate_up_kernel
    down_kernel: Any = _down_kernel
    route[(num_experts,)](
        index, pairs, counts, num_pairs, BLOCK=min(1024, triton.next_power_of_2(num_pairs))
    )
    gate_up_kernel[triton.cdiv(width, up_tile.columns), num_experts](
        tokens, up_weight, up_scale, pairs, counts, inner, num_pairs, hidden, width,
        K=index.shape[1], SCALED=up_scale is not None, GROUP=up_group, **launch(up_tile, hidden),
    )  # fmt: skip
    down_kernel[triton.cdiv(hidden, down_tile.columns), num_experts](
        inner, down_weight, down_scale, weights, pairs, counts, out, num_pairs, hidden, width,
        SCALED=down_scale is not None, GROUP=down_group, **launch(down_tile, width),
    )  # fmt: skip
    return out.view(num_tokens, -1, hidden).sum(dim=1)


def launch(tile: Tile, depth: int) -> dict[str, Any]:
    """A tile as arguments of a kernel that multiplies along `depth`."""
    return {
        "BLOCK_M": tile.tokens,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "DIVIDES": depth % tile.depth == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def default_tiles(
    num_pairs: int, num_experts: int, tokens: torch.dtype, weight: torch.dtype
) -> tuple[Tile, Tile]:
    """Tiles of the gate and up projections, and of the down projection, by pairs per expert.

    What decides is that enough copies are on their way (140 KiB or more on each multiprocessor of
    an H100, E 256, D 2048, I 512), and that no conversion takes longer than reading. A tile of
    fewer warps loads the tokens for more weights. Float32 products take three times the registers,
    so they keep the smallest tile.
    """
    if tokens == torch.float32:
        return Tile(16, 32, 64), Tile(16, 32, 64)
    is_packed = weight == torch.int16
    if num_pairs <= 8 * num_experts:
        if weight.itemsize == 2 and not is_packed:
            return Tile(16, 32, 128), Tile(16, 64, 128)
        return Tile(16, 32, 128, warps=2, stages=4), Tile(16, 64, 128, warps=2, stages=4)
    if num_pairs <= 16 * num_experts or is_packed:
        if weight.itemsize == 2 and not is_packed:
            return Tile(32, 32, 128), Tile(32, 64, 64, stages=4)
        return Tile(32, 64, 128, stages=4), Tile(32, 64, 128, stages=4)
    return Tile(64, 64, 64), Tile(64, 64, 64)
