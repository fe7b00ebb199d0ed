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


@triton.jit
def _blend_kernel(  # type: ignore[no-untyped-def]
    table, mask_row, tokens, where, ids, probs, out, size,
    K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The input of one position."""
    position = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < size
    out_at = out + position * size + column
    if tl.load(where + position):
        mixed = tl.zeros((BLOCK_D,), tl.float32)
        target = 0.0
        rest = 1.0
        for rank in tl.static_range(K):
            prob = tl.load(probs + position * K + rank)
            row_at = table + tl.load(ids + position * K + rank) * size + column
            row = tl.load(row_at, mask=inside, other=0.0).to(tl.float32)
            mixed += prob * row
            target += prob * tl.sqrt(tl.sum(row * row))
            rest -= prob
        mask = tl.load(mask_row + column, mask=inside, other=0.0).to(tl.float32)
        mixed += rest * mask  # equations 8 and 9
        if RENORMALIZE:  # equation 10
            target += rest * tl.sqrt(tl.sum(mask * mask))
            mixed *= target / (tl.sqrt(tl.sum(mixed * mixed)) + 1e-6)
        tl.store(out_at, mixed.to(out.dtype.element_ty), mask=inside)
    else:
        row_at = table + tl.load(tokens + position) * size + column
        tl.store(out_at, tl.load(row_at, mask=inside), mask=inside)


def embed_soft(
    table: Tensor,
    tokens: Tensor,
    where: Tensor,
    ids: Tensor,
    probs: Tensor,
    mask_token_id: int,
    renormalize: bool,
) -> Tensor:
    """`dmax.blend.embed_tokens` from a table [V, D], with one program for each position.

    Args:
        table: [V, D] float32, float16 or bfloat16.
        tokens: [B, L] int64.
        where: [B, L] bool, as in `dmax.blend.SoftTokens`.
        ids: [B, L, k] int64, likewise.
        probs: [B, L, k] float32, likewise.
        mask_token_id: MASK.
        renormalize: whether equation 10 is applied.
    """
    size = table.shape[1]
    table = table.contiguous()
    out = torch.empty(*tokens.shape, size, dtype=table.dtype, device=table.device)
    block_d = triton.next_power_of_2(size)
    kernel: Any = _blend_kernel
    kernel[(tokens.numel(),)](
        table, table[mask_token_id], tokens.contiguous(), where.contiguous(), ids.contiguous(),
        probs.contiguous(), out, size,
        K=ids.shape[-1], RENORMALIZE=renormalize, BLOCK_D=block_d,
        num_warps=8 if block_d > 2048 else 4,
    )  # fmt: skip
    return out
