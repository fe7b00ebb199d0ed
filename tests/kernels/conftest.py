"""Where Triton's kernels run in tests: compiled on a GPU, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from interpreted import is_interpreted

from dmax.kernels import using

if TYPE_CHECKING:
    from sanitizer import Watch


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The GPU, or the CPU for the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not is_interpreted():
        pytest.skip("Triton's interpreter before 3.7 cannot count loops with NumPy 2.4")
    return torch.device("cpu")


@pytest.fixture
def kernels(triton_device: torch.device) -> Iterator[torch.device]:
    """The device where Triton's kernels run, and from now on do so."""
    with using("triton"):
        yield triton_device


@pytest.fixture(autouse=True)
def watched() -> Iterator[Watch | None]:
    """The sanitizer, which checks whatever the interpreter runs; None on a GPU."""
    if not is_interpreted():
        yield None
        return
    from sanitizer import watch  # which imports triton

    with watch() as seen:
        yield seen
