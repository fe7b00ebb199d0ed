"""Weight-only quantisation of experts: less to read for each forward, so faster where reading weights is the cost.

| format | stored | scale |
|---|---|---|
| int8 | one byte | one float32 for each output channel |
| fp8 | e4m3, one byte | one float32 for each output channel |
| int4 | two in a byte | one bfloat16 for a group of 128 (or 64, or 32) input channels |

All have no offset, round to nearest and need no data. Activations stay as they are. On a GPU the
Triton kernels (`moe_triton.py`) turn weights into numbers in registers; elsewhere they are
dequantised one expert at a time, which saves memory, not time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn

from dmax.errors import InputError, did_you_mean
from dmax.kernels import FUSED_DTYPES, implementation, wants_gradient
from dmax.kernels.moe import SILU, fused_moe, routed

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
        values: [E, R, C] int8 or float8_e4m3fn; for int4 [E, R, C / 2] uint8, whose bytes hold, of
            each group of columns, the first half in the low and the second half in the high four
            bits, 8 added to each.
        scale: [E, R, G], of each of G groups of columns; G is 1 but for int4.
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
        return Size((*self.values.shape[:-1], self.values.shape[-1] * (2 if self.is_packed else 1)))

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    def __getitem__(self, expert: int) -> Tensor:
        """Matrix [R, C] of one expert, dequantised to float32."""
        values = self.values[expert]
        scale = self.scale[expert]
        if self.is_packed:
            halves = values.unflatten(-1, (-1, self.group_size // 2))  # [R, G, group / 2]
            values = (torch.cat((halves & 15, halves >> 4), dim=-1).to(torch.int8) - 8).flatten(1)
        grouped = values.float().unflatten(-1, (scale.shape[-1], -1))  # [R, G, group]
        return (grouped * scale[..., None].float()).flatten(1)


def check_format(form: str) -> None:
    """Raise `InputError` if there is no such format."""
    if form not in BOUNDS:
        raise InputError(
            f"unknown format {form!r}; choose from {', '.join(BOUNDS)}", did_you_mean(form, BOUNDS)
        )


def quantize(weight: Tensor, form: Format) -> QuantizedWeight:
    """Round stacked matrices [E, R, C] to a format, one expert at a time.

    Raises:
        InputError: an unknown format, weights that are not finite, or columns that int4 groups do
            not divide.
    """
    check_format(form)
    if not weight.isfinite().all():
        raise InputError(
            "weights that are not finite cannot be quantised", hint="check the checkpoint"
        )
    columns = weight.shape[-1]
    group = (
        next((size for size in GROUP_SIZES if columns % size == 0), 0)
        if form == "int4"
        else columns
    )
    if not group:
        raise InputError(
            f"int4 needs a number of input channels that {GROUP_SIZES[-1]} divides, got {columns}",
            hint="choose int8 or fp8",
        )
    values, scales = zip(
        *(_quantize_matrix(matrix.float(), form, group) for matrix in weight), strict=True
    )
    return QuantizedWeight(torch.stack(values), torch.stack(scales))


def _quantize_matrix(matrix: Tensor, form: Format, group: int) -> tuple[Tensor, Tensor]:
    """Values and scales of one matrix [R, C] float32."""
    lowest, highest = BOUNDS[form]
    grouped = matrix.unflatten(-1, (-1, group))  # [R, G, group]
    extreme = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True))  # [R, G, 1]
    # The largest becomes the lowest number, of which two's complement has one more; it may turn the
    # signs.
    scale = extreme / lowest
    if form == "int4":
        scale = scale.to(
            torch.bfloat16
        )  # rounded before it is used, so that its own error is not added
    scale = scale.masked_fill(scale == 0, 1.0)
    scaled = (grouped / scale.float()).clamp(lowest, highest)
    if form == "fp8":
        return scaled.flatten(1).to(FP8), scale[..., 0]
    whole = scaled.round().to(torch.int8)
    if form == "int8":
        return whole.flatten(1), scale[..., 0]
    low, high = (whole + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).flatten(1), scale[..., 0]


class QuantizedExperts(nn.Module):
    """Takes the place of a layer's stacked experts; the same call, whatever experts implementation the model names.

    State: buffers `gate_up_values`, `gate_up_scale`, `down_values` and `down_scale` (see
        `QuantizedWeight`).
    """

    gate_up_values: Tensor
    gate_up_scale: Tensor
    down_values: Tensor
    down_scale: Tensor

    def __init__(
        self, gate_up: QuantizedWeight, down: QuantizedWeight, act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.act_fn = act_fn
        for name, weight in (("gate_up", gate_up), ("down", down)):
            self.register_buffer(f"{name}_values", weight.values)
            self.register_buffer(f"{name}_scale", weight.scale)

    @property
    def gate_up(self) -> QuantizedWeight:
        """[E, 2I, D]."""
        return QuantizedWeight(self.gate_up_values, self.gate_up_scale)

    @property
    def down(self) -> QuantizedWeight:
        """[E, D, I]."""
        return QuantizedWeight(self.down_values, self.down_scale)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over each token's experts; tokens [N, D], index [N, K] int64, weights [N, K] to [N, D].

        Raises:
            InputError: a gradient is wanted, which rounded weights do not have.
        """
        if wants_gradient(hidden_states):
            raise InputError(
                "a model with quantised experts cannot be trained",
                hint="load it without quantisation",
            )
        arguments = (hidden_states, top_k_index, top_k_weights, self.gate_up, self.down)
        is_fused = (
            isinstance(self.act_fn, SILU)
            and hidden_states.dtype in FUSED_DTYPES
            and self._gpu_has_format()
        )
        return fused_moe(*arguments) if is_fused else routed(*arguments, self.act_fn)

    def _gpu_has_format(self) -> bool:
        """Triton compiles e4m3 for compute capability 8.9 and later only."""
        device = self.down_values.device
        if implementation(device) != "triton":
            return False
        return self.down_values.dtype != FP8 or torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_experts(model: nn.Module, form: Format) -> None:
    """Replace the stacked experts of every layer by quantised ones; the model can then decode, not train or be saved.

    Layer by layer, so that the peak is the model and one quantised layer. All parameters stop
    wanting gradients.

    Args:
        model: any with modules that hold `gate_up_proj` [E, 2I, D], `down_proj` [E, D, I] and
            `act_fn`, as `LLaDA2MoeExperts` does.
        form: "int8", "fp8" or "int4".

    Raises:
        InputError: no experts to quantise, or what `quantize` refuses.
    """
    layers = [name for name, module in model.named_modules() if _is_stacked(module)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no experts to quantise")
    for name in layers:
        experts: Any = model.get_submodule(name)
        try:
            gate_up = quantize(experts.gate_up_proj.data, form)
            down = quantize(experts.down_proj.data, form)
        except InputError as error:
            raise InputError(f"{name}: {error.message}", error.hint) from None
        model.set_submodule(name, QuantizedExperts(gate_up, down, experts.act_fn))
        del experts
    model.requires_grad_(False)


def check_savable(model: nn.Module) -> None:
    """Raise `InputError` if a model's experts are quantised: no published layout holds them."""
    if any(isinstance(module, QuantizedExperts) for module in model.modules()):
        raise InputError(
            "a model with quantised experts cannot be saved",
            hint="save it before, and quantise when it is loaded",
        )


def _is_stacked(module: Any) -> bool:
    tensors = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(tensor, nn.Parameter) and tensor.dim() == 3 for tensor in tensors)
