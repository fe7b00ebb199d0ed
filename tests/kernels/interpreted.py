"""Whether kernels run under Triton's interpreter in these tests."""

from __future__ import annotations

from importlib.metadata import version

import torch
from packaging.version import Version

from dmax.kernels import has_triton


def is_interpreted() -> bool:
    """Without a GPU they do; before 3.7 the interpreter cannot count loops with NumPy 2.4."""
    if torch.cuda.is_available() or not has_triton():
        return False
    return Version(version("triton")) >= Version("3.7")
