"""Bytes that a forward must read: at batch 1 the time that takes is the least it can take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dmax.benchmark.measure import Spread

Bytes = dict[str, float]


def forward_bytes(model: Any, distinct: float, context: float, batch: int = 1) -> Bytes:
    """Bytes of weights, keys and values that one denoising forward reads, by part of the model.

    Activations, embedding rows and the norms between layers are left out: together they are under
    0.1 %. Logits are left out too, because a fused head never writes them.

    Args:
        model: a LLaDA-2.x model, its experts quantised or not.
        distinct: experts that the tokens of the forward hit, as a mean over layers.
        context: positions whose keys and values are read, for each of the `batch` sequences.
        batch: sequences.
    """
    config = model.config
    parts = dict.fromkeys(("experts", "attention", "shared_experts", "router", "dense_layers"), 0.0)
    for layer in model.base_model.layers:
        parts["attention"] += num_bytes(layer.attention.parameters())
        if not hasattr(layer.mlp, "experts"):
            parts["dense_layers"] += num_bytes(layer.mlp.parameters())
            continue
        experts = layer.mlp.experts
        weights = (*experts.parameters(), *experts.buffers())  # buffers if they are quantised
        parts["experts"] += num_bytes(weights) * distinct / config.num_experts
        parts["shared_experts"] += num_bytes(layer.mlp.shared_experts.parameters())
        parts["router"] += num_bytes(layer.mlp.gate.parameters())

    head = model.get_output_embeddings()
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    parts["head"] = num_bytes(head.parameters())
    parts["cache"] = keys_and_values * head.weight.element_size() * context * batch
    return parts


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def against_floor(milliseconds: Spread, parts: Bytes, bandwidth: Spread) -> dict[str, Any]:
    """The floor of a measured time: how long reading the bytes takes at a bandwidth in bytes/s.

    Returns:
        `bytes` and their sum `gb`, `floor_ms`, and `of_floor`, the floor's share of the time.
    """
    total = sum(parts.values())
    floor = total / bandwidth["median"] * 1e3
    of_floor = floor / milliseconds["median"]
    return {"bytes": parts, "gb": total / 1e9, "floor_ms": floor, "of_floor": of_floor}
