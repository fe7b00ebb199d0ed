"""How kernels are launched: with which options of the compiler."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import pytest
import torch

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


@pytest.mark.parametrize(
    ("backend", "arch", "overlaps"), [("cuda", 90, True), ("cuda", 80, False), ("hip", 942, False)]
)
def test_kernels_start_early_where_the_gpu_can_and_somebody_wants_it(
    backend: str, arch: int, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from dmax.kernels import pdl_triton

    target = SimpleNamespace(backend=backend, arch=arch)
    active = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(pdl_triton, "driver", SimpleNamespace(active=active))
    gpu = torch.device("cuda")
    off = {"PDL": False}
    with pdl_triton.overlapping(False):
        with pdl_triton.overlapping(True):
            wanted = pdl_triton.launch_options(gpu)
            assert wanted == ({"PDL": True, "launch_pdl": True} if overlaps else off)
            assert pdl_triton.launch_options(torch.device("cpu")) == off  # the interpreter
        assert pdl_triton.launch_options(gpu) == off


def test_a_chain_of_kernels_that_start_early_reads_what_the_ones_before_wrote(
    kernels: torch.device,
) -> None:
    """Each writes where the one after the next has to read; on a GPU in a CUDA graph as well."""
    from dmax.kernels import norm_triton, pdl_triton

    first = torch.randn(16, 64, device=kernels)
    weight = torch.rand(64, device=kernels) + 0.5

    def chain() -> torch.Tensor:
        total = first
        normed = first
        for _ in range(40 if kernels.type == "cuda" else 4):
            total, normed = norm_triton.add_rms_norm(total, normed[..., None, :], weight, 1e-6)
        return normed

    with pdl_triton.overlapping(False):
        expected = chain()
    with pdl_triton.overlapping(True):
        assert torch.equal(chain(), expected)
        if kernels.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = chain()
            for _ in range(10):
                result.zero_()
                graph.replay()
                assert torch.equal(result, expected)
