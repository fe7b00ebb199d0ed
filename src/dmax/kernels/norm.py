"""Root-mean-square norms, by themselves or after an addition, each in one kernel on a GPU.

As in the published models, the norm is taken in float32 and rounded before its weight is applied.
PyTorch needs two kernels for that, and others for the additions. The Triton path
(`norm_triton.py`) needs one, and rounds at the same places, but a sum of many terms only once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dmax.kernels import can_fuse

MAX_SIZE = 8192  # of what is normed: a program holds all of it


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of `x` [..., D], times `weight` [D]."""
    if fits_kernel(weight, x):
        from dmax.kernels import norm_triton

        _, normed = norm_triton.add_rms_norm(x, None, weight, eps)
        return normed
    return weight * F.rms_norm(x, weight.shape, eps=eps)


def add_and_norm(x: Tensor, more: Tensor | None, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """The sum of `x` [..., D] and more, and its norm by a module that calls `rms_norm`.

    Args:
        x: [..., D].
        more: [..., D], or T terms [..., T, D]; without it the sum is `x` itself.
        norm: its weight is [D].
    """
    if more is None:
        return x, norm(x)
    has_terms = more.dim() > x.dim()
    if fits_kernel(norm.weight, x, more):
        from dmax.kernels import norm_triton

        assert norm.eps is not None
        terms = more if has_terms else more[..., None, :]
        return norm_triton.add_rms_norm(x, terms, norm.weight, norm.eps)
    total = x + (more.sum(dim=-2) if has_terms else more)
    return total, norm(total)


def fits_kernel(weight: Tensor, *inputs: Tensor) -> bool:
    """Whether the kernel takes these tensors; only sizes, dtypes, devices and gradients decide.

    A weight that is elsewhere (offloaded) comes when the module that owns it runs.
    """
    return (
        can_fuse(*inputs, weight)
        and len(weight) <= MAX_SIZE
        and all(each.dtype == weight.dtype and each.device == weight.device for each in inputs)
    )
