"""How kernels are launched: with which options of the compiler."""

from __future__ import annotations

import os
import warnings

import pytest

import dmax.kernels  # noqa: F401  (the options are set before Triton is imported)


def test_products_and_sums_round_once_with_every_release_of_triton() -> None:
    """Triton 3.9 warns where nothing is said, because 3.10 no longer fuses them then."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    assert "TRITON_DEFAULT_FP_FUSION" in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = CUDABackend(GPUTarget("cuda", 90, 32)).parse_options({"arch": "sm90"})
    is_off = os.environ["TRITON_DEFAULT_FP_FUSION"] == "0"  # whoever runs this may say so
    assert options.enable_fp_fusion is not is_off
