"""Where Triton's kernels run in tests: compiled on a GPU, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from packaging.version import Version

from dmax.kernels import using


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The GPU, or the CPU for the interpreter."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if Version(triton.__version__) < Version("3.7"):
        pytest.skip("Triton's interpreter before 3.7 cannot count loops with NumPy 2.4")
    return torch.device("cpu")


@pytest.fixture
def kernels(triton_device: torch.device) -> Iterator[torch.device]:
    """The device where Triton's kernels run, and from now on do so."""
    with using("triton"):
        yield triton_device
