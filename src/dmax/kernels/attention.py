"""Transformers' attention functions, with another `sdpa` for CPUs.

Shapes: B sequences, L queries, S keys, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface


def sdpa_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers', bit for bit; but it repeats keys and values of grouped heads for a mask, which a CPU need not.

    Args:
        module: the attention layer.
        query: [B, H, L, d].
        key: [B, G, S, d]; H is a multiple of G.
        value: [B, G, S, d].
        attention_mask: bool or additive, [B, 1, L, S], or None. There is no causal mask of its own
            on a CPU.
        scaling: what the scores are multiplied with.
        dropout: probability that a weight is dropped.
        kwargs: for transformers' function.

    Returns:
        The heads' outputs [B, L, H, d], and None for the weights.
    """
    if query.device.type != "cpu":
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


ATTENTION_FUNCTIONS = AttentionInterface()  # this instance alone has another `sdpa`
ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
