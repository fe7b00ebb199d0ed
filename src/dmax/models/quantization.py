"""Models with quantised experts: they decode from fewer bytes, and are neither trained nor saved.

The formats and their arithmetic are in `dmax.kernels.quant`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmax.errors import InputError
from dmax.kernels import can_fuse, wants_gradient
from dmax.kernels.moe import SILU, Activation, fused_moe, routed
from dmax.kernels.quant import FP8, Format, QuantizedWeight, quantize


class QuantizedExperts(nn.Module):
    """Takes the place of a layer's stacked experts under every experts implementation.

    Its state is in the buffers `gate_up_values`, `gate_up_scale`, `down_values` and `down_scale`
    (see `QuantizedWeight`).
    """

    gate_up_values: Tensor
    gate_up_scale: Tensor
    down_values: Tensor
    down_scale: Tensor

    def __init__(self, gate_up: QuantizedWeight, down: QuantizedWeight, act_fn: Activation) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.register_buffer("gate_up_values", gate_up.values)
        self.register_buffer("gate_up_scale", gate_up.scale)
        self.register_buffer("down_values", down.values)
        self.register_buffer("down_scale", down.scale)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over each token's experts, as `LLaDA2MoeExperts.forward` gives it.

        Args:
            hidden_states: [N, D] tokens.
            top_k_index: [N, K] int64.
            top_k_weights: [N, K].

        Raises:
            InputError: a gradient is wanted, which rounded weights do not have.
        """
        if wants_gradient(hidden_states):
            raise InputError(
                "a model with quantised experts cannot be trained",
                hint="load it without quantisation",
            )
        arguments = hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj
        if can_fuse(hidden_states) and self.runs_fused():
            return fused_moe(*arguments)
        return routed(*arguments, self.act_fn)

    @property
    def gate_up_proj(self) -> QuantizedWeight:
        """[E, 2I, D]."""
        return QuantizedWeight(self.gate_up_values, self.gate_up_scale)

    @property
    def down_proj(self) -> QuantizedWeight:
        """[E, D, I]."""
        return QuantizedWeight(self.down_values, self.down_scale)

    def runs_fused(self) -> bool:
        """Whether Triton compiles the format: e4m3 takes compute capability 8.9 or later."""
        values = self.down_values
        has_format = values.dtype != FP8 or not values.is_cuda
        has_format = has_format or torch.cuda.get_device_capability(values.device) >= (8, 9)
        return has_format and isinstance(self.act_fn, SILU)


def quantize_experts(model: nn.Module, form: Format) -> None:
    """Replace the stacked experts of every layer by quantised ones; no parameter keeps a gradient.

    This goes layer by layer, so that the peak of memory is the model and one quantised layer.

    Args:
        model: any with modules that hold `gate_up_proj` [E, 2I, D], `down_proj` [E, D, I] and
            `act_fn`, as `LLaDA2MoeExperts` does.
        form: "int8", "fp8" or "int4".

    Raises:
        InputError: no experts to quantise, or what `quantize` refuses.
    """
    layers = [name for name, module in model.named_modules() if _has_stacked_experts(module)]
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
    model.requires_grad_(False)


def check_savable(model: nn.Module) -> None:
    """Raise `InputError` if a model's experts are quantised: no published layout holds them."""
    if any(isinstance(module, QuantizedExperts) for module in model.modules()):
        raise InputError(
            "a model with quantised experts cannot be saved",
            hint="save it before, and quantise when it is loaded",
        )


def _has_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of a layer's experts; a dense layer holds modules."""
    return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
