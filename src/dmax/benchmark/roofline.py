"""Bytes that a forward must read, and the time that takes at least: at batch 1 a forward is bound by its weights.

N tokens of a forward, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

from dmax.kernels.quant import GROUP_SIZES, Format

Bytes = dict[str, float]


def expected_distinct(num_experts: int, per_token: int, tokens: int) -> float:
    """Distinct experts that N tokens hit if each draws K of E at random: E (1 - (1 - K/E)^N)."""
    return float(num_experts * (1 - (1 - per_token / num_experts) ** tokens))


def forward_bytes(
    config: Any,
    *,
    distinct: float,
    context: float,
    batch: int = 1,
    itemsize: int = 2,
    quantization: Format | None = None,
) -> Bytes:
    """Bytes of weights, keys and values that one denoising forward reads, by part of the model.

    Activations, embedding rows and the small norms, under 0.1 % together, are left out, and so are
    logits, which a fused head never writes.

    Args:
        config: of a LLaDA-2.x model.
        distinct: experts that the tokens of the forward hit, as a mean over layers.
        context: positions whose keys and values are read, for each of the `batch` sequences.
        batch: sequences.
        itemsize: bytes of a weight, and of a key or value.
        quantization: of the routed experts alone.
    """
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    dense_layers = config.first_k_dense_replace
    moe_layers = layers - dense_layers
    expert = 3 * config.moe_intermediate_size * hidden
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "experts": distinct * moe_layers * expert_bytes(config, itemsize, quantization),
        "attention": itemsize * layers * hidden * (2 * queries + 2 * keys),
        "shared_experts": itemsize * moe_layers * config.num_shared_experts * expert,
        "router": itemsize * moe_layers * config.num_experts * hidden,
        "dense_layers": itemsize * dense_layers * 3 * config.intermediate_size * hidden,
        "head": itemsize * config.vocab_size * hidden,
        "cache": itemsize * layers * 2 * keys * context * batch,
    }


def expert_bytes(config: Any, itemsize: int, quantization: Format | None) -> float:
    """Bytes of one routed expert: gate and up [2I, D] and down [D, I], scales included."""
    inner = config.moe_intermediate_size
    hidden = config.hidden_size
    if quantization is None:
        return itemsize * 3 * inner * hidden
    if quantization == "int4":  # a bfloat16 scale for a group of input channels
        wide, narrow = (
            next(size for size in GROUP_SIZES if columns % size == 0) for columns in (hidden, inner)
        )
        return 2 * inner * hidden * (0.5 + 2 / wide) + inner * hidden * (0.5 + 2 / narrow)
    return 3 * inner * hidden + 4 * (2 * inner + hidden)  # a float32 scale for an output channel
