"""Weight-only quantisation: there is less to read for each forward, where reading is the cost.

| format | stored | scale |
|---|---|---|
| int8 | one byte | one float32 for each output channel |
| fp8 | e4m3, one byte | one float32 for each output channel |
| int4 | two in a byte | one bfloat16 for a group of 128 (or 64, or 32) input channels |

The formats have no offset, round to nearest and need no data. Activations stay as they are. On a
GPU the Triton kernels (`moe_triton.py`) turn weights into numbers in registers. Elsewhere they are
dequantised one expert at a time, which saves memory, not time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from dmax.errors import InputError, did_you_mean, show

Format = Literal["int8", "fp8", "int4"]
GROUP_SIZES = (128, 64, 32)
FP8 = torch.float8_e4m3fn
BOUNDS: dict[Format, tuple[float, float]] = {
    "int8": (-128, 127),
    "fp8": (torch.finfo(FP8).min, torch.finfo(FP8).max),
    "int4": (-8, 7),
}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Stacked matrices [E, R, C] in one of the formats.

    Attributes:
        values: [E, R, C] int8 or float8_e4m3fn. For int4 [E, R, C / 2] uint8: with 8 added to each
            number, every two bytes hold one of each quarter of a group, from the lowest bits up.
        scale: [E, R, G], one for each of G groups of columns; only int4 has more than one group.
    """

    values: Tensor
    scale: Tensor

    @property
    def is_packed(self) -> bool:
        """Whether a byte holds two numbers."""
        return self.values.dtype == torch.uint8

    @property
    def shape(self) -> Size:
        """[E, R, C]."""
        columns = self.values.shape[-1] * (2 if self.is_packed else 1)
        return Size((*self.values.shape[:-1], columns))

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    def __getitem__(self, expert: int) -> Tensor:
        """Matrix [R, C] of one expert, dequantised to float32."""
        values = self.values[expert]
        scale = self.scale[expert]
        if self.is_packed:
            words = values.unflatten(-1, (scale.shape[-1], -1, 2))  # [R, G, group / 4, 2]
            codes = torch.stack((words & 15, words >> 4), dim=-1).flatten(-2)  # the last: quarters
            values = codes.to(torch.int8).transpose(-1, -2).flatten(1) - 8
        grouped = values.float().unflatten(-1, (scale.shape[-1], -1))  # [R, G, group]
        return (grouped * scale[..., None].float()).flatten(1)


def check_format(form: str) -> None:
    """Raise `InputError` if there is no such format."""
    if not isinstance(form, str) or form not in BOUNDS:
        message = f"unknown format {show(form)}; choose from {', '.join(BOUNDS)}"
        raise InputError(message, did_you_mean(form, BOUNDS))


def quantize(weight: Tensor, form: Format) -> QuantizedWeight:
    """Round stacked matrices [E, R, C] to a format, one expert at a time.

    Raises:
        InputError: an unknown format, weights that are not finite, or columns that int4 groups do
            not divide.
    """
    check_format(form)
    if not weight.isfinite().all():
        message = "weights that are not finite cannot be quantised"
        raise InputError(message, hint="check the checkpoint")
    group = columns = weight.shape[-1]
    if form == "int4":
        if columns % GROUP_SIZES[-1]:
            smallest = GROUP_SIZES[-1]
            raise InputError(
                f"int4 needs a number of input channels that {smallest} divides, got {columns}",
                hint="choose int8 or fp8",
            )
        group = next(size for size in GROUP_SIZES if columns % size == 0)
    rounded = [_quantize_matrix(matrix.float(), form, group) for matrix in weight]
    values, scales = zip(*rounded, strict=True)
    return QuantizedWeight(torch.stack(values), torch.stack(scales))


def _quantize_matrix(matrix: Tensor, form: Format, group: int) -> tuple[Tensor, Tensor]:
    """Values and scales of one matrix [R, C] float32."""
    lowest, highest = BOUNDS[form]
    grouped = matrix.unflatten(-1, (-1, group))  # [R, G, group]
    extreme = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True))  # [R, G, 1]
    # The largest number becomes the lowest, as two's complement reaches further below zero than
    # above it. The scale may be negative.
    scale = extreme / lowest
    if form == "int4":
        scale = scale.to(torch.bfloat16)  # before it is used, so that its own error is not added
    scale = scale.masked_fill(scale == 0, 1.0)
    scaled = (grouped / scale.float()).clamp(lowest, highest)
    if form == "fp8":
        return scaled.flatten(1).to(FP8), scale[..., 0]
    whole = scaled.round().to(torch.int8)
    if form == "int8":
        return whole.flatten(1), scale[..., 0]
    codes = (whole + 8).to(torch.uint8).unflatten(-1, (4, -1)).transpose(-1, -2)
    low, high = codes.unflatten(-1, (2, 2)).unbind(-1)  # [R, G, group / 4, 2]
    return (low | (high << 4)).flatten(1), scale[..., 0]
