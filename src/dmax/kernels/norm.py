"""Root-mean-square norms, alone or behind the addition that comes before them.

As in the published models the norm is taken in float32 and rounded before its weight is applied. In
PyTorch that is two kernels, three with the addition; the Triton path (`norm_triton.py`) is one, and
rounds where the twin does.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dmax.kernels import FUSED_DTYPES, implementation, triton_kernels, wants_gradient

MAX_SIZE = 8192  # of what is normed: a program holds all of it


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of `x` [..., D], times `weight` [D]."""
    if _can_fuse(weight, x):
        return triton_kernels("norm").add_rms_norm(x, None, weight, eps)[1]
    return weight * F.rms_norm(x, weight.shape, eps=eps)


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of `x` and `more`, both [..., D], and its norm times `weight` [D]."""
    if _can_fuse(weight, x, more):
        return triton_kernels("norm").add_rms_norm(x, more, weight, eps)
    total = x + more
    return total, rms_norm(total, weight, eps)


def _can_fuse(weight: Tensor, *inputs: Tensor) -> bool:
    return (
        implementation(weight.device) == "triton"
        and len(weight) <= MAX_SIZE
        and weight.dtype in FUSED_DTYPES
        and all(each.dtype == weight.dtype for each in inputs)
        and not wants_gradient(weight, *inputs)
    )
