"""The Triton path of `norm.py`, with one program for each position."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.kernels.pdl_triton import begin, launch_options


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, more, weight, total, normed, size, eps,
    ADDS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The norm of one position's `x`, or of `x + more`."""
    begin(PDL)
    column = tl.arange(0, BLOCK_D)
    inside = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    value = tl.load(x + at, mask=inside, other=0.0)
    dtype = value.dtype
    if ADDS:
        added = tl.load(more + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total + at, value, mask=inside)
    wide = value.to(tl.float32)
    normal = (wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)).to(dtype).to(tl.float32)
    scaled = normal * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(dtype), mask=inside)


def add_rms_norm(
    x: Tensor, more: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`dmax.kernels.norm.add_rms_norm`; without `more` the sum is `x` itself."""
    x = x.contiguous()
    size = x.shape[-1]
    total = x
    if more is not None:
        more = more.contiguous()
        total = torch.empty_like(x)
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    kernel: Any = _norm_kernel
    kernel[(x.numel() // size,)](
        x, more, weight.contiguous(), total, normed, size, eps,
        ADDS=more is not None, BLOCK_D=block, num_warps=min(max(block // 512, 1), 8),
        **launch_options(x.device),
    )  # fmt: skip
    return total, normed
