"""From tokens to the experts they go to: logits in float32, sigmoid scores, group-limited choice, normalised weights.

At 32 tokens none of this is work, but in PyTorch it is some fifteen kernels a layer, each of which
takes a GPU as long as reading megabytes of weights; the Triton path (`router_triton.py`) is a
product and one kernel.

Shapes: N tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.kernels import FUSED_DTYPES, implementation, triton_kernels, wants_gradient


@dataclass(frozen=True, slots=True)
class Routing:
    """How experts are chosen.

    Attributes:
        top_k: experts per token K.
        num_groups: the experts stand in so many groups of the same size.
        num_kept_groups: groups whose experts can be chosen: those whose two best score highest
            together.
        normalizes: weights of a token sum to 1, before they are scaled.
        scaling: what weights are multiplied with.
    """

    top_k: int
    num_groups: int = 1
    num_kept_groups: int = 1
    normalizes: bool = True
    scaling: float = 1.0


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Expert indices [N, K] int64, in no order, and their weights [N, K] float32 (float64 of float64 tokens).

    Args:
        x: [N, D].
        weight: [E, D] of the router.
        bias: [E] float32, steers the choice and never the weights.
        routing: see there.
    """
    if (
        implementation(x.device) == "triton"
        and x.dtype in FUSED_DTYPES
        and not wants_gradient(x, weight)
    ):
        kernels = triton_kernels("router")
        return kernels.select(kernels.router_logits(x, weight), bias, routing)
    return select(router_logits(x, weight), bias, routing)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Tokens times the router's weights, [N, E], in float32, whatever autocast says."""
    device = (
        x.device.type
    )  # to leave autocast costs as much as a small product, so only where it is on
    is_on = not x.is_meta and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if is_on else nullcontext():
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), weight.to(wide))


def select(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """The twin of the kernel: `route` behind the product, of logits [N, E]."""
    scores = logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if routing.num_kept_groups < routing.num_groups:
        choice = _keep_best_groups(choice, routing)
    index = choice.topk(routing.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, index)
    if routing.normalizes:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return index, weights if routing.scaling == 1 else weights * routing.scaling


def _keep_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    """Bar experts outside the kept groups."""
    grouped = choice.unflatten(-1, (routing.num_groups, -1))  # [N, groups, E / groups]
    strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = strength.topk(routing.num_kept_groups, dim=-1, sorted=False).indices
    barred = torch.ones_like(strength, dtype=torch.bool).scatter(-1, kept, False)
    return grouped.masked_fill(barred[..., None], float("-inf")).flatten(-2)
