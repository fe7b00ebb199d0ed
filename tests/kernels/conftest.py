"""Where Triton's kernels run in tests: compiled on a GPU, else under Triton's interpreter (see `tests/conftest.py`)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The GPU, or the CPU for the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
