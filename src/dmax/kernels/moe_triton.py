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


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    left, left_row, weight, scale, row, depth,
    SCALED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """left[left_row] · weight[row]ᵀ, [BLOCK_M, BLOCK_N] float32, for weights as they are stored."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    left_at = left + left_row.to(tl.int64)[:, None] * depth
    if GROUP == 0:  # each number has its own storage, and a row has at most one scale
        column = tl.arange(0, BLOCK_K)
        weight_at = weight + row.to(tl.int64)[None, :] * depth
        for start in range(0, depth, BLOCK_K):
            inside = start + column < depth
            a = tl.load(left_at + (start + column)[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(weight_at + (start + column)[:, None], mask=inside[:, None], other=0.0)
            total = tl.dot(a, b.to(a.dtype), total, input_precision="tf32x3")
        if SCALED:
            total *= tl.load(scale + row)[None, :]
    else:  # a byte holds two numbers, one of each half of a group; a group has a scale
        column = tl.arange(0, GROUP // 2)
        weight_at = weight + row.to(tl.int64)[None, :] * (depth // 2)
        for group in range(0, depth // GROUP):
            packed = tl.load(weight_at + (group * (GROUP // 2) + column)[:, None]).to(tl.int32)
            low = tl.load(left_at + (group * GROUP + column)[None, :])
            high = tl.load(left_at + (group * GROUP + GROUP // 2 + column)[None, :])
            part = tl.dot(low, ((packed & 15) - 8).to(low.dtype), input_precision="tf32x3")
            part = tl.dot(high, ((packed >> 4) - 8).to(low.dtype), part, input_precision="tf32x3")
            total += part * tl.load(scale + row * (depth // GROUP) + group).to(tl.float32)[None, :]
    return total


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    tokens, weight, scale, pairs, counts, inner, num_pairs, hidden, width,
    K: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
            tokens, pair // K, weight, scale, expert * 2 * width + row, hidden,
            SCALED, GROUP, BLOCK_M, 2 * BLOCK_N, BLOCK_K,
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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
            inner, pair, weight, scale, row, width, SCALED, GROUP, BLOCK_M, BLOCK_N, BLOCK_K
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
    tile: Tile | None = None,
) -> Tensor:
    """`dmax.kernels.moe.fused_moe` on the device of `tokens`; `tile` is for tuning."""
    up_weight, up_scale, up_group = gate_up
    down_weight, down_scale, down_group = down
    num_tokens, hidden = tokens.shape
    num_experts, doubled_width, _ = up_weight.shape
    width = doubled_width // 2
    num_pairs = index.numel()
    tokens = tokens.contiguous()
    index = index.contiguous()
    weights = weights.contiguous()
    tile = tile or default_tile(num_pairs, num_experts, tokens.dtype, up_weight.dtype)

    def new(*shape: int, dtype: torch.dtype = tokens.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    pairs = new(num_experts, num_pairs, dtype=torch.int32)
    counts = new(num_experts, dtype=torch.int32)
    inner = new(num_pairs, width)
    out = new(num_pairs, hidden)
    sizes = {"BLOCK_M": tile.tokens, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
    launch = sizes | {"num_warps": tile.warps, "num_stages": tile.stages}
    route: Any = _route_kernel
    gate_up_kernel: Any = _gate_up_kernel
    down_kernel: Any = _down_kernel
    route[(num_experts,)](
        index, pairs, counts, num_pairs, BLOCK=min(1024, triton.next_power_of_2(num_pairs))
    )
    gate_up_kernel[triton.cdiv(width, tile.columns), num_experts](
        tokens, up_weight, up_scale, pairs, counts, inner, num_pairs, hidden, width,
        K=index.shape[1], SCALED=up_scale is not None, GROUP=up_group, **launch,
    )  # fmt: skip
    down_kernel[triton.cdiv(hidden, tile.columns), num_experts](
        inner, down_weight, down_scale, weights, pairs, counts, out, num_pairs, hidden, width,
        SCALED=down_scale is not None, GROUP=down_group, **launch,
    )  # fmt: skip
    return out.view(num_tokens, -1, hidden).sum(dim=1)


def default_tile(
    num_pairs: int, num_experts: int, tokens: torch.dtype, weight: torch.dtype
) -> Tile:
    """Steps of 256 bytes along the product, and larger tiles as experts get more tokens.

    These are the sizes that published tuning for H100 cards settles on, for kernels of this shape
    (E 256, D 2048, I 512). Float32 products take three times the registers, so they keep the
    smallest tile.
    """
    depth = 256 // weight.itemsize
    if tokens == torch.float32:
        return Tile(16, 32, 64)
    if num_pairs < 2 * num_experts:
        return Tile(16, 32, depth)
    if num_pairs < 16 * num_experts:
        return Tile(16, 64, depth)
    return Tile(64, 64, 64)
