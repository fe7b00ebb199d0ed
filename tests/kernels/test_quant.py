"""Quantised weights: the formats on numbers worked out by hand, the kernels against their twin."""

from __future__ import annotations

import re
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
    # -4 becomes -8, so the scale is 0.5 and these are -8, 6, 2, 5 and -1.
    row = torch.zeros(32)
    row[[0, 1, 8, 17, 24]] = torch.tensor([-4.0, 3.0, 1.0, 2.5, -0.5])
    stored = quantize(row.repeat(1, 1, 3), "int4")  # 96 columns make three groups of 32
    assert stored.scale.tolist() == [[[0.5, 0.5, 0.5]]]
    # Two bytes hold columns 0, 8, 16 and 24 of a group, the next two 1, 9, 17 and 25, all 8 higher.
    assert stored.values[0, 0, :4].tolist() == [0 | 10 << 4, 8 | 7 << 4, 14 | 8 << 4, 13 | 8 << 4]
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


# ---- conversion in PTX ------------------------------------------------------------------------


def emulated(ptx: str, words: Tensor) -> list[Tensor]:
    """The outputs of lines of PTX, [N] int64 words of 32 bits each, for their one input [N]."""
    registers: dict[str, Tensor] = {}
    names = sorted(set(re.findall(r"\$\d", ptx)))
    registers[names[-1]] = words

    def value(operand: str) -> Tensor:
        if operand in registers:
            return registers[operand]
        return torch.full_like(words, int(operand, 0))

    def bfloat16(word: Tensor) -> Tensor:
        halves = torch.stack((word & 0xFFFF, word >> 16), dim=-1).to(torch.uint16)
        return halves.view(torch.bfloat16)

    for line in re.findall(r"^(\w[^;]*);", ptx, re.MULTILINE):
        operation, _, operands = line.partition(" ")
        target, *given = operands.split(", ")
        sources = [value(operand) for operand in given]
        if operation == "mov.b32":
            (found,) = sources
        elif operation == "and.b32":
            found = sources[0] & sources[1]
        elif operation == "shr.b32":
            found = sources[0] >> sources[1]
        elif operation == "lop3.b32":
            assert given[3] == "0xea"  # the truth table of this formula
            found = sources[0] & sources[1] | sources[2]
        elif operation == "prmt.b32":
            both = torch.cat(
                [source[:, None] >> torch.arange(0, 32, 8) for source in sources[:2]], 1
            )
            selected = (int(given[2], 0) >> torch.arange(0, 16, 4)) & 7
            found = ((both[:, selected] & 255) << torch.arange(0, 32, 8)).sum(dim=1)
        else:
            assert operation == "fma.rn.bf16x2"
            factor, other, offset = (bfloat16(source).double() for source in sources)
            exact = (factor * other + offset).to(torch.bfloat16)
            low, high = exact.view(torch.uint16).long().unbind(-1)
            found = low | high << 16
        registers[target] = found
    return [bfloat16(registers[name]) for name in names[:-1]]


def test_every_fp8_code_is_exact(triton_device: torch.device) -> None:
    from dmax.kernels import moe_triton

    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127]  # the two NaN, which `quantize` never makes
    four = torch.stack([codes.roll(shift) for shift in range(4)], dim=-1)  # [254, 4]
    words = (four.long() << torch.arange(0, 32, 8)).sum(dim=-1)
    found = torch.cat(emulated(moe_triton.FP8_TO_BF16.value, words), dim=-1)
    expected = four.view(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))  # zero has a sign


def test_every_int4_code_is_exact(triton_device: torch.device) -> None:
    from dmax.kernels import moe_triton

    numbers = torch.arange(2**16)
    words = numbers | numbers.flip(0) << 16
    quarters = emulated(moe_triton.INT4_TO_BF16.value, words)
    for quarter, found in enumerate(quarters):
        both = torch.stack((numbers, numbers.flip(0)), dim=-1)
        assert torch.equal(found.long(), (both >> 4 * quarter & 15) - 8)


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
