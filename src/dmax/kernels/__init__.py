"""Implementations chosen for the hardware at hand, each with a plain PyTorch twin.

`name.py` holds what to call and the twin, `name_triton.py` the Triton path, which alone imports triton.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from dmax.errors import InputError, did_you_mean

IMPLEMENTATIONS = ("triton", "torch")


@cache
def choose(device: torch.device, override: str | None = None) -> tuple[str, str]:
    """The implementation to use on a device, "triton" or "torch", and why.

    Only the device and the installed packages decide, so the answer is the same in a whole process.

    Args:
        device: where the tensors are.
        override: ask for one of the two; on a CPU, "triton" only runs under Triton's interpreter.

    Raises:
        InputError: an unknown implementation, or Triton asked for where it is not installed.
    """
    installed = importlib.util.find_spec("triton") is not None
    if override is not None:
        if override not in IMPLEMENTATIONS:
            message = f"unknown implementation {override!r}; choose from {', '.join(IMPLEMENTATIONS)}"
            raise InputError(message, did_you_mean(override, IMPLEMENTATIONS))
        if override == "triton" and not installed:
            raise InputError("triton is not installed", hint="install it, or ask for `torch`")
        return override, "asked for"
    if device.type != "cuda":
        return "torch", f"Triton does not compile for {device.type}"
    return ("triton", "a CUDA GPU and triton are present") if installed else ("torch", "triton is not installed")
