"""Norms: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dmax.kernels.norm import add_and_norm, fits_kernel, rms_norm
from dmax.models.llada2_moe.modeling import LLaDA2MoeRMSNorm

EPS = 1e-6


def case(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 3, size)
    more = 3 * torch.randn(2, 3, size)
    weight = torch.rand(size) + 0.5
    return x.to(dtype), more.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [5, 64, 576])
def test_the_kernel_equals_the_twin(
    size: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    x, more, weight = case(size, dtype)
    expected = rms_norm(x, weight, EPS)
    total = x + more
    expected_of_total = rms_norm(total, weight, EPS)
    device = request.getfixturevalue("kernels")
    x, more, weight = (each.to(device) for each in (x, more, weight))
    norm = LLaDA2MoeRMSNorm(size, EPS)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    assert fits_kernel(weight, x, more)
    found_total, found_of_total = add_and_norm(x, more, norm)
    last = torch.finfo(dtype).eps  # the mean of squares is summed in another order
    assert torch.equal(found_total.cpu(), total)
    tolerance = {"rtol": 2 * last, "atol": last}
    torch.testing.assert_close(found_of_total.cpu(), expected_of_total, **tolerance)
    torch.testing.assert_close(rms_norm(x, weight, EPS).cpu(), expected, **tolerance)


def test_views_are_taken(kernels: torch.device) -> None:
    x, _, weight = case(8, torch.float32)
    turned = x.to(kernels).mT.contiguous().mT
    found = rms_norm(turned, weight.to(kernels), EPS)
    torch.testing.assert_close(found.cpu(), weight * x / x.square().mean(-1, True).sqrt())


@pytest.mark.usefixtures("kernels")
def test_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from dmax.kernels import norm_triton

    sentinel = torch.zeros(1)
    monkeypatch.setattr(norm_triton, "add_rms_norm", lambda *_: (sentinel, sentinel))
    x, more, weight = case(8, torch.float32)

    def fuses(x: Tensor, more: Tensor, weight: Tensor) -> bool:
        is_fused = rms_norm(x, weight, EPS) is sentinel
        assert fits_kernel(weight, x, more) == is_fused
        return is_fused

    assert fuses(x, more, weight)
    assert not fuses(x.double(), more.double(), weight.double())
    assert not fuses(x.half(), more.half(), weight)  # a norm in float32 of 16 bits promotes
    assert not fits_kernel(weight.to("meta"), x, more)  # a weight that is not loaded yet
    learned = weight.clone().requires_grad_()
    assert not fuses(x, more, learned)  # a gradient is wanted, and the kernel has none
    with torch.no_grad():
        assert fuses(x, more, learned)
