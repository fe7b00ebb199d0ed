"""From tokens to their experts: float32 logits, sigmoid scores and a choice by groups.

For 32 tokens this is hardly any work, but PyTorch needs some fifteen kernels for it in each layer.
Each of them takes a GPU as long as reading megabytes of weights. The Triton path
(`router_triton.py`) is a product and one kernel, which for up to 32 tokens also lists the tokens of
every expert.

Shapes: N tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.kernels import autocast_dtype, can_fuse


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Tokens [N, D] times router weights [E, D], in float32 or wider even under autocast."""
    device = x.device.type
    if device != "cpu" and x.dtype == weight.dtype != torch.float32 and can_fuse(x, weight):
        # Products of 16 bits are exact in float32, so no wide copies are needed.
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    # Leaving autocast costs as much as a small product, so it is left only where it is on.
    is_on = autocast_dtype(x) is not None
    with torch.autocast(device, enabled=False) if is_on else nullcontext():
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), weight.to(wide))


def select_experts(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int = 1,
    num_kept_groups: int = 1,
    normalizes: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The experts of every token, and how much each of them counts.

    Args:
        logits: [N, E] float32, or float64.
        bias: [E] float32; it steers which experts are chosen, never their weights.
        top_k: K.
        num_groups: the experts are divided into so many groups of one size.
        num_kept_groups: so many groups can be chosen from: those whose two best experts have the
            highest sum.
        normalizes: whether a token's weights are made to sum to 1, before they are scaled.
        scaling: what the weights are multiplied with.

    Returns:
        Indices [N, K] int64, in no order, and weights [N, K] in the dtype of `logits`.
    """
    if can_fuse(logits):
        from dmax.kernels import router_triton

        return router_triton.select_experts(
            logits, bias, top_k, num_groups, num_kept_groups, normalizes, scaling
        )
    scores = logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if num_kept_groups < num_groups:
        choice = _keep_best_groups(choice, num_groups, num_kept_groups)
    index = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, index)
    if normalizes:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return index, weights if scaling == 1 else weights * scaling


def route_tokens(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    idle: Tensor | None,
    num_terms: int,
    **settings: Any,
) -> Any:
    """The tokens of every expert, as the Triton kernels of `moe.py` take them.

    It is for what `can_fuse` admits. The twin is `router_logits` and `select_experts`, which know
    no idle rows.

    Args:
        tokens: [N, D].
        weight: [E, D] in the dtype of `tokens`.
        bias: [E] float32.
        idle: [B] bool, which of B rows of tokens stand for nothing and go to no expert.
        num_terms: outputs that `expert_terms` makes for each token.
        settings: of `select_experts`.
    """
    from dmax.kernels import router_triton

    return router_triton.route_tokens(tokens, weight, bias, idle, num_terms, **settings)


def _keep_best_groups(choice: Tensor, num_groups: int, num_kept: int) -> Tensor:
    """Experts outside the kept groups get the lowest score, [N, E]."""
    grouped = choice.unflatten(-1, (num_groups, -1))  # [N, groups, E / groups]
    strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = strength.topk(num_kept, dim=-1, sorted=False).indices
    barred = torch.ones_like(strength, dtype=torch.bool).scatter(-1, kept, False)
    return grouped.masked_fill(barred[..., None], float("-inf")).flatten(-2)
