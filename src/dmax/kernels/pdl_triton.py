"""Programmatic dependent launch: a kernel starts while the one before it still runs.

Without it a GPU starts a kernel once all programs of the one before have ended, and stands still in
between. With it the next programs are put in place as soon as the last ones of this kernel have
begun; there they wait until all that was computed before can be read. A kernel takes part in three
places:

    def _some_kernel(..., PDL: tl.constexpr):
        begin(PDL)                               # before it reads or writes anything
        ...
    _some_kernel[grid](..., **launch_options(x.device))

Kernels of others may stand in between: to those, and after them, everything is as without it. It
takes an NVIDIA GPU of compute capability 9.0 or later, and is off unless the environment has
`DMAX_PDL=1` or `overlapping(True)` says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

_is_on = os.environ.get("DMAX_PDL") == "1"


@triton.jit
def begin(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until kernels before this one have written everything; let the next one be started."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch, for a kernel that calls `begin`; graphs keep what they were made with.

    On a CPU, which has the interpreter, nothing overlaps, and neither do kernels in code of
    `torch.compile`, which knows no such launch.
    """
    if not _is_on or device.type == "cpu" or torch.compiler.is_compiling():
        return {"PDL": False}
    target = driver.active.get_current_target()
    has_pdl = target.backend == "cuda" and target.arch >= 90
    return {"PDL": True, "launch_pdl": True} if has_pdl else {"PDL": False}


@contextmanager
def overlapping(is_on: bool) -> Iterator[None]:
    """Start kernels early, or not, within a `with` block: to compare the two in one process."""
    global _is_on
    before = _is_on
    _is_on = is_on
    try:
        yield
    finally:
        _is_on = before
