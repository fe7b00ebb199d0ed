"""The early layers of a model as they were before training: features that do not learn."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dmax.adapters import without_adapters
from dmax.errors import InputError
from dmax.models.backbone import decoder_layers


@torch.no_grad()
def frozen_features(
    model: Any, layer: int, device: torch.device, dtype: torch.dtype | None = None
) -> Any:
    """A copy of a model up to one of its layers, which gives the residual stream behind it.

    It stands in a `CleanStream` as a model does. Its states are [B, L, D] features, before the last
    norm and any output layer; a model that reads predictions shifted by one has them at the
    position itself, as they are to tell what a token there means. It is in evaluation mode and has
    no gradient. What of the model learns is copied. The rest is shared with it: under adapters that
    is the base, and the copy has adapters of its own.

    All processes have to call it together: they copy the weights of rank 0, which alone has some
    before a model is sharded.

    Args:
        model: a block-diffusion model, or one with adapters of `peft`.
        layer: the last one that is copied, counted from 0.
        device: where the copy lies.
        dtype: of its weights; buffers keep theirs, rotary frequencies among them. None: as they
            are.

    Raises:
        InputError: the model has no such layer.
    """
    network = without_adapters(model)
    layers = decoder_layers(network)
    if layer >= len(layers):
        raise InputError(
            f"the model has {len(layers)} layers, counted from 0, and none is {layer}",
            hint="lower `mmd_layer`",
        )
    left_out = (*layers[layer + 1 :], network.get_output_embeddings())
    unused = {id(weight) for module in left_out for weight in module.parameters()}
    unused -= {id(weight) for weight in network.get_input_embeddings().parameters()}
    used = [weight for weight in network.parameters() if id(weight) not in unused]
    known: dict[int, Any] = {id(module): nn.Identity() for module in left_out}
    known |= {id(weight): _still(weight, dtype) for weight in used}
    known |= {id(buffer): buffer.clone() for buffer in network.buffers()}
    frozen = deepcopy(network, known)

    copied = decoder_layers(frozen)
    del copied[layer + 1 :]
    _end_behind(copied[layer], frozen.base_model)
    frozen.config.num_hidden_layers = layer + 1
    frozen.has_linear_head = True  # so its states are hidden ones
    frozen.config.shift = False
    _place(frozen, device)
    return frozen.eval().requires_grad_(False)


def _end_behind(layer: nn.Module, base: nn.Module) -> None:
    """Have a base model give what leaves one of its layers, before any norm that comes later."""
    found: dict[str, Any] = {}

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found["states"] = output[0] if isinstance(output, tuple) else output

    def give(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = found.pop("states")
        return outputs

    layer.register_forward_hook(keep)
    base.register_forward_hook(give)


def _still(weight: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """A weight that does not learn: a copy of one that does, or the same."""
    if not weight.requires_grad:
        return weight
    return nn.Parameter(weight.to(dtype or weight.dtype, copy=True), requires_grad=False)


def _place(network: nn.Module, device: torch.device) -> None:
    """Bring a network to a device, on every rank as it is on rank 0."""
    if any(weight.is_meta for weight in network.parameters()):
        network.to_empty(device=device)
    for value in (*network.parameters(), *network.buffers()):
        value.data = value.data.to(device)
        if dist.is_initialized():
            dist.broadcast(value.data, src=0)
