"""Quantised weights: the formats on numbers worked out by hand, the kernels against their twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.errors import InputError
from dmax.kernels.moe import fused_moe, routed
from dmax.kernels.quant import Format, quantize

FORMATS: tuple[Format, ...] = ("int8", "fp8", "int4")
EXPERTS = 8
TOP_K = 2


def dequantized(weight: Tensor, form: Format) -> Tensor:
    stored = quantize(weight, form)
    return torch.stack([stored[expert] for expert in range(len(weight))])


# ---- formats ------------------------------------------------------------------------------------


def test_int8_by_hand() -> None:
    # The largest becomes -128: the scales are 0.02 and, with turned signs, -0.02.
    stored = quantize(torch.tensor([[[-2.56, 1.27, 0.0, 0.031], [2.56, -2.54, 0.5, 0.0]]]), "int8")
    # 63.5 rounds to the even 64.
    assert stored.values.tolist() == [[[-128, 64, 0, 2], [-128, 127, -25, 0]]]
    torch.testing.assert_close(stored.scale, torch.tensor([[[0.02], [-0.02]]]))
    expected = torch.tensor([[-2.56, 1.28, 0.0, 0.04], [2.56, -2.54, 0.5, 0.0]])
    torch.testing.assert_close(stored[0], expected)
    assert stored.shape == (1, 2, 4)


def test_fp8_by_hand() -> None:
    # The scale is 1. e4m3 has four binary digits, so 17 lies between 16 and 18, and a tie goes to
    # the even digit.
    stored = quantize(torch.tensor([[[-448.0, 17.0, 19.0, 0.0]]]), "fp8")
    assert stored.values.dtype == torch.float8_e4m3fn
    assert stored[0].tolist() == [[-448.0, 16.0, 20.0, 0.0]]


def test_int4_by_hand() -> None:
    # -4 becomes -8, so the scale is 0.5 and these are -8, 6, 2 and 5.
    row = torch.zeros(32)
    row[[0, 1, 16, 17]] = torch.tensor([-4.0, 3.0, 1.0, 2.5])
    stored = quantize(row.repeat(1, 1, 3), "int4")  # 96 columns make three groups of 32
    assert stored.scale.tolist() == [[[0.5, 0.5, 0.5]]]
    # Low halves hold columns 0 to 15 of a group, high halves 16 to 31, each with 8 added.
    assert stored.values[0, 0, :3].tolist() == [0 | 10 << 4, 14 | 13 << 4, 8 | 8 << 4]
    assert stored.shape == (1, 1, 96)
    assert torch.equal(stored[0], row.repeat(1, 3))


@pytest.mark.parametrize(("columns", "group"), [(512, 128), (64, 64), (160, 32)])
def test_int4_takes_the_largest_group_that_divides(columns: int, group: int) -> None:
    stored = quantize(torch.randn(2, 3, columns), "int4")
    assert stored.group_size == group
    assert stored.values.shape == (2, 3, columns // 2)
    assert stored.scale.shape == (2, 3, columns // group)


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.01), ("fp8", 0.03), ("int4", 0.11)])
def test_rounding_errors_are_those_of_the_format(form: Format, bound: float) -> None:
    weight = torch.randn(2, 64, 256)
    error = (dequantized(weight, form) - weight).norm() / weight.norm()
    assert bound / 3 <= error <= bound


@pytest.mark.parametrize("form", FORMATS)
def test_zero_and_tiny_rows_stay_finite(form: Format) -> None:
    weight = torch.zeros(1, 3, 64)
    weight[0, 1, 0] = 1e-40
    weight[0, 2, 5] = 3e38
    back = dequantized(weight, form)
    assert back[0, 0].eq(0).all() and back[0, 1].abs().max() <= 1.1e-40
    torch.testing.assert_close(back[0, 2], weight[0, 2], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("weight", "form", "message"),
    [
        (torch.ones(1, 2, 48), "int4", "input channels that 32 divides, got 48"),
        (torch.tensor([[[1.0, float("nan")]]]), "int8", "not finite"),
        (torch.ones(1, 2, 64), "int5", "unknown format 'int5'; choose from int8, fp8, int4"),
    ],
)
def test_what_cannot_be_quantised(weight: Tensor, form: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(weight, form)


# ---- kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_equal_their_twin(
    triton_device: torch.device, dtype: torch.dtype, num_tokens: int, form: Format
) -> None:
    if (
        form == "fp8"
        and triton_device.type == "cuda"
        and torch.cuda.get_device_capability() < (8, 9)
    ):
        pytest.skip("this GPU has no e4m3")
    index = torch.rand(num_tokens, EXPERTS).topk(TOP_K).indices.to(triton_device)
    tokens = torch.randn(num_tokens, 64, device=triton_device, dtype=dtype)
    weights = torch.randn(num_tokens, TOP_K, device=triton_device, dtype=dtype)
    gate_up = quantize((torch.randn(EXPERTS, 64, 64) * 0.2).to(triton_device), form)
    down = quantize((torch.randn(EXPERTS, 64, 32) * 0.2).to(triton_device), form)
    actual = fused_moe(tokens, index, weights, gate_up, down)
    exact = routed(tokens.double(), index, weights.double(), gate_up, down, F.silu)
    error = ((actual.double() - exact).norm() / exact.norm()).item()
    assert error <= {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
