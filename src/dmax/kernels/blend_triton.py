"""The Triton path of `dmax.blend.embed_tokens`: gather, mix and rescale in one kernel.

The PyTorch path stores the k gathered rows of every position, in float32 too. This one reads k + 1
rows and writes one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.kernels.pdl_triton import begin, launch_options


@triton.jit(do_not_specialize=("rows",))  # a view, whose alignment varies
def _blend_kernel(  # type: ignore[no-untyped-def]
    table, tokens, where, masked, ids, probs, rows, out, size, mask_token_id,
    token_stride, where_stride, masked_stride,
    L: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The input of one position."""
    begin(PDL)
    row = tl.program_id(1).to(tl.int64)
    out_at = (row * L + tl.program_id(0)) * size
    if rows is not None:
        row = tl.load(rows + row)
    place = tl.program_id(0)
    position = row * L + place
    column = tl.arange(0, BLOCK_D)
    inside = column < size
    is_soft = tl.load(where + row * where_stride + place)
    if masked is not None:
        is_soft = is_soft & ~tl.load(masked + row * masked_stride + place)
    if is_soft:
        mixed = tl.zeros((BLOCK_D,), tl.float32)
        target = 0.0
        rest = 1.0
        for rank in tl.static_range(K):
            prob = tl.load(probs + position * K + rank)
            token_at = table + tl.load(ids + position * K + rank) * size + column
            token = tl.load(token_at, mask=inside, other=0.0).to(tl.float32)
            mixed += prob * token
            target += prob * tl.sqrt(tl.sum(token * token))
            rest -= prob
        mask_at = table + tl.full((), mask_token_id, tl.int64) * size + column
        mask = tl.load(mask_at, mask=inside, other=0.0).to(tl.float32)
        mixed += rest * mask  # equations 8 and 9
        if RENORMALIZE:  # equation 10
            target += rest * tl.sqrt(tl.sum(mask * mask))
            mixed *= target / (tl.sqrt(tl.sum(mixed * mixed)) + 1e-6)
        tl.store(out + out_at + column, mixed.to(out.dtype.element_ty), mask=inside)
    else:
        token_at = table + tl.load(tokens + row * token_stride + place) * size + column
        tl.store(out + out_at + column, tl.load(token_at, mask=inside), mask=inside)


def embed_soft(
    table: Tensor, tokens: Tensor, soft: Any, mask_token_id: int, rows: Tensor | None = None
) -> Tensor:
    """`dmax.blend.embed_tokens` from a table [V, D], with one program for each position.

    Args:
        table: [V, D] float32, float16 or bfloat16.
        tokens: [B, L] int64.
        soft: a `dmax.blend.SoftTokens` with the same leading dimension.
        mask_token_id: MASK.
        rows: [N] int64, the sequences that are wanted, which are read where they are; None: all.
    """
    size = table.shape[1]
    num_rows, length = tokens.shape
    if rows is not None:
        num_rows = len(rows)
    tokens = _side_by_side(tokens)
    where = _side_by_side(soft.where)
    masked = None if soft.masked is None else _side_by_side(soft.masked)
    masked_stride = 0 if masked is None else masked.stride(0)
    out = torch.empty(num_rows, length, size, dtype=table.dtype, device=table.device)
    block_d = triton.next_power_of_2(size)
    kernel: Any = _blend_kernel
    kernel[length, num_rows](
        table.contiguous(), tokens, where, masked,
        soft.ids.contiguous(), soft.probs.contiguous(), rows, out, size, mask_token_id,
        tokens.stride(0), where.stride(0), masked_stride,
        L=length, K=soft.ids.shape[-1], RENORMALIZE=soft.renormalize, BLOCK_D=block_d,
        num_warps=8 if block_d > 2048 else 4, **launch_options(table.device),
    )  # fmt: skip
    return out


def _side_by_side(values: Tensor) -> Tensor:
    """[B, L] with the positions of a row next to each other, whatever lies between rows."""
    return values if values.stride(1) == 1 else values.contiguous()
