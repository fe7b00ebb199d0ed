"""Whether numbers are finite, asked before they reach a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dmax.errors import InputError
from dmax.training.sharding import local


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> tuple[str, float] | None:
    """Name of the first tensor that holds an infinity or NaN, and which one; None without any.

    The largest magnitude of all says whether there is one: one pass and one wait for the device.
    Of a sharded tensor, a rank looks at what it holds. Tensors on the meta device have no numbers.
    """
    held = ((name, local(tensor)) for name, tensor in tensors if not tensor.is_meta)
    named = [
        (name, tensor) for name, tensor in held if tensor.is_floating_point() and tensor.numel()
    ]
    if get_total_norm([tensor for _, tensor in named], norm_type=torch.inf).isfinite():
        return None
    for name, tensor in named:
        others = tensor[~tensor.isfinite()]
        if len(others):
            return name, others[0].item()
    return None


def weights(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers by name; tied ones come once."""
    return chain(model.named_parameters(), model.named_buffers())


def check_weights(model: nn.Module) -> None:
    """Raise `InputError` naming the first weight of a model to start from that is not finite."""
    found = first_not_finite(weights(model))
    if found is not None:
        name, value = found
        raise InputError(
            f"the model to start from has a weight that is not finite: `{name}` holds {value}",
            hint="start from another checkpoint",
        )
