"""Root-mean-square norms, alone or behind the addition that comes before them.

As in the published models the norm is taken in float32 and rounded before its weight is applied. In PyTorch that is two
kernels, three with the addition; the Triton path (`norm_triton.py`) is one, and rounds where the twin does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.kernels import choose

MAX_SIZE = 8192  # of what is normed: a program holds all of it


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of `x` [..., D], times `weight` [D]."""
    if _can_fuse(x, weight):
        from dmax.kernels import norm_triton  # imports triton

        return norm_triton.add_rms_norm(x, None, weight, eps)[1]
    return weight * F.rms_norm(x, weight.shape, eps=eps)


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of `x` and `more`, both [..., D], and its norm times `weight` [D]."""
    if _can_fuse(x, weight) and x.dtype == more.dtype and not (torch.is_grad_enabled() and more.requires_grad):
        from dmax.kernels import norm_triton  # imports triton

        return norm_triton.add_rms_norm(x, more, weight, eps)
    total = x + more
    return total, weight * F.rms_norm(total, weight.shape, eps=eps)


def _can_fuse(x: Tensor, weight: Tensor) -> bool:
    return (
        choose(x.device)[0] == "triton"
        and x.shape[-1] <= MAX_SIZE
        and x.dtype == weight.dtype != torch.float64
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )
