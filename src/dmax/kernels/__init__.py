"""Kernels for the hardware at hand, each with a twin in plain PyTorch.

`name.py` holds the function to call and its twin. `name_triton.py` holds the Triton kernels: these
files are the only ones that import triton, and they import nothing of dmax but each other. They are
imported where they are called, by a plain `import`: that is what `torch.compile` can trace.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from dmax.errors import InputError, did_you_mean

# Products and sums round once, as the kernels were tested; Triton 3.10 rounds twice unless told.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

Implementation = Literal["triton", "torch"]
IMPLEMENTATIONS = get_args(Implementation)
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels compute in

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # finding out takes a search
_forced: Implementation | None = None


def implementation(device: torch.device) -> Implementation:
    """The implementation to use on a device: "triton" on a CUDA GPU where triton is installed.

    Only the device and the installed packages decide, so the answer stays the same for a whole
    process, except within `using`.
    """
    if _forced is not None:
        return _forced
    return "triton" if device.type == "cuda" and has_triton() else "torch"


@contextmanager
def using(name: Implementation) -> Iterator[None]:
    """Use one implementation on every device within a `with` block.

    This serves comparisons, and tells a fault of a kernel from a fault of a model. On a CPU,
    "triton" runs only under Triton's interpreter.

    Raises:
        InputError: an unknown implementation, or "triton" where it is not installed.
    """
    global _forced
    if name not in IMPLEMENTATIONS:
        message = f"unknown implementation {name!r}; choose from {', '.join(IMPLEMENTATIONS)}"
        raise InputError(message, did_you_mean(name, IMPLEMENTATIONS))
    if name == "triton" and not has_triton():
        raise InputError("triton is not installed", hint="install it, or ask for `torch`")
    before = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = before


def has_triton() -> bool:
    """Whether triton is installed."""
    return _HAS_TRITON


def can_fuse(*tensors: torch.Tensor) -> bool:
    """Whether Triton kernels run on these tensors; only device, dtypes and gradients decide."""
    return (
        implementation(tensors[0].device) == "triton"
        and all(tensor.dtype in FUSED_DTYPES for tensor in tensors)
        and not wants_gradient(*tensors)
    )


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether what is computed from these tensors needs a gradient; no kernel here has one."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast has for products on the tensor's device; None where it is off."""
    device = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
