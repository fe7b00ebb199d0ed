"""The Triton path of `norm.py`, with one program for each position."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.kernels.pdl_triton import begin, launch_options


@triton.jit(do_not_specialize=["adds"])  # a norm alone runs the code of one after an addition
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, terms, weight, total, normed, size, eps, adds,
    TERMS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The norm of one position's `x`, or of its sum with its terms."""
    begin(PDL)
    column = tl.arange(0, BLOCK_D)
    inside = column < size
    position = tl.program_id(0).to(tl.int64)
    at = position * size + column
    value = tl.load(x + at, mask=inside, other=0.0)
    dtype = value.dtype
    added = tl.zeros((BLOCK_D,), tl.float32)
    for term in tl.static_range(TERMS):
        at_term = terms + (position * TERMS + term) * size + column
        added += tl.load(at_term, mask=column < size * adds, other=0.0).to(tl.float32)
    value = (value.to(tl.float32) + added).to(dtype)
    tl.store(total + at, value, mask=column < size * adds)
    wide = value.to(tl.float32)
    normal = (wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)).to(dtype).to(tl.float32)
    scaled = normal * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(dtype), mask=inside)


def add_rms_norm(
    x: Tensor, terms: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum of `x` [..., D] and `terms` [..., T, D], rounded once, and its norm.

    Without terms the sum is `x` itself.
    """
    x = x.contiguous()
    size = x.shape[-1]
    adds = terms is not None
    terms = x[..., None, :] if terms is None else terms.contiguous()
    total = torch.empty_like(x) if adds else x
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    kernel: Any = _norm_kernel
    kernel[(x.numel() // size,)](
        x, terms, weight.contiguous(), total, normed, size, eps, int(adds),
        TERMS=terms.shape[-2], BLOCK_D=block, num_warps=min(max(block // 512, 1), 8),
        **launch_options(x.device),
    )  # fmt: skip
    return total, normed
