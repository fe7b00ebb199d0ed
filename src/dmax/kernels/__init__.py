"""Implementations chosen for the hardware at hand, each with a plain PyTorch twin.

`name.py` holds what to call and the twin, `name_triton.py` the Triton path, which alone imports
triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from dmax.errors import InputError, did_you_mean

IMPLEMENTATIONS = ("triton", "torch")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels compute in

_wanted: str | None = None


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """One implementation within, on every device: for comparisons, and to tell a kernel's fault from a model's.

    Raises:
        InputError: as `choose` does.
    """
    global _wanted
    before = _wanted
    _wanted = choose(torch.device("cpu"), implementation)[0]
    try:
        yield
    finally:
        _wanted = before


@cache
def has_triton() -> bool:
    """Whether it is installed; asking takes a search through the path."""
    return importlib.util.find_spec("triton") is not None


def choose(device: torch.device, override: str | None = None) -> tuple[str, str]:
    """The implementation to use on a device, "triton" or "torch", and why.

    Only the device and the installed packages decide, so the answer is the same in a whole process
    (but for `using`).

    Args:
        device: where the tensors are.
        override: ask for one of the two; on a CPU, "triton" only runs under Triton's interpreter.

    Raises:
        InputError: an unknown implementation, or Triton asked for where it is not installed.
    """
    if override is not None:
        if override not in IMPLEMENTATIONS:
            message = (
                f"unknown implementation {override!r}; choose from {', '.join(IMPLEMENTATIONS)}"
            )
            raise InputError(message, did_you_mean(override, IMPLEMENTATIONS))
        if override == "triton" and not has_triton():
            raise InputError("triton is not installed", hint="install it, or ask for `torch`")
        return override, "asked for"
    if _wanted is not None:
        return _wanted, "nothing else is wanted"
    if device.type != "cuda":
        return "torch", f"Triton does not compile for {device.type}"
    return (
        ("triton", "a CUDA GPU and triton are present")
        if has_triton()
        else ("torch", "triton is not installed")
    )


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether something computed of these is to have a gradient, which no kernel here has."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
