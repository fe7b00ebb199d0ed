"""Mixture-of-experts forwards, registered in transformers' experts interface beside `eager` and `grouped_mm`.

Shapes: N tokens, D hidden, I inner size, E experts, K experts per token; a pair is one token with
    one of its experts.
All take tokens [N, D], index [N, K] int64 and weights [N, K] of the router, gate and up projections
stacked as [E, 2I, D], down projections [E, D, I], and give the weighted sum over each token's
experts [N, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dmax.kernels import FUSED_DTYPES, implementation, triton_kernels, wants_gradient

if TYPE_CHECKING:
    from dmax.kernels.moe_triton import Tile
    from dmax.kernels.quant import QuantizedWeight

SILU = (nn.SiLU, type(ACT2FN["silu"]))
# Above this many pairs per expert the weights no longer bound the time, and large matrix products
# win.
MAX_FUSED_PAIRS_PER_EXPERT = 16


def dense_mm_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """For a handful of experts on a CPU: few tokens go through every expert, many through their own.

    Every expert is E/K times the arithmetic, but in two large products and with no sorting. From 64
    tokens in float32 the arithmetic is what costs; products in bfloat16 are cheap enough to delay
    that to 128 (measured with E 4, K 2, D 256, I 160, on one core and on two). Under torch.compile,
    which cannot trace `routed`, all take the first way.
    """
    enough = 64 if hidden_states.dtype.itemsize >= 4 else 128
    few = torch.compiler.is_compiling() or hidden_states.shape[0] < enough
    forward = dense if few else routed
    gate_up = experts.gate_up_proj
    down = experts.down_proj
    return forward(hidden_states, top_k_index, top_k_weights, gate_up, down, experts.act_fn)


def fused_moe_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """For many experts on a GPU: the Triton kernels for a few blocks of tokens, else `grouped_mm`.

    Only shapes, dtypes and the device decide, never values, so a CUDA graph can hold the call.
    Gradients, which the kernels do not have, large inputs, other activations than SiLU and expert
    parallelism are left to `grouped_mm`.
    """
    gate_up = experts.gate_up_proj
    down = experts.down_proj
    tensors = (hidden_states, top_k_weights, gate_up, down)
    if (
        implementation(hidden_states.device) == "triton"
        and top_k_index.numel() <= MAX_FUSED_PAIRS_PER_EXPERT * gate_up.shape[0]
        and isinstance(experts.act_fn, SILU)
        and hidden_states.dtype == gate_up.dtype
        and hidden_states.dtype in FUSED_DTYPES
        and not wants_gradient(*tensors)
        and not getattr(experts, "_is_expert_parallel", False)
    ):
        return fused_moe(hidden_states, top_k_index, top_k_weights, gate_up, down)
    grouped: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return grouped(experts, hidden_states, top_k_index, top_k_weights)


def fused_moe(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """SiLU experts in two Triton kernels; the twin is `routed` with `F.silu`.

    The kernels read the weights of the experts in use once.
    The kernels accumulate in float32 and round the inner state and each expert's output to the
    dtype of `tokens`; the sum over a token's experts is in a fixed order. Static shapes, no wait
    for the device, no gradient.

    Args:
        tokens: [N, D] float32, float16 or bfloat16.
        index: [N, K] int64, in [0, E).
        weights: [N, K], any floating dtype.
        gate_up: [E, 2I, D] in the dtype of `tokens`, or quantised.
        down: [E, D, I] likewise.
        tile: block sizes to try instead of the kernels' own choice.
    """
    return triton_kernels("moe").fused_moe(tokens, index, weights, gate_up, down, tile)


def dense(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act_fn: Callable[[Tensor], Tensor],
) -> Tensor:
    """Every token through every expert in two large products; unchosen experts weigh 0. No data-dependent shape."""
    spread = torch.zeros(
        gate_up.shape[0], tokens.shape[0], dtype=weights.dtype, device=tokens.device
    )
    spread = spread.scatter(0, index.T, weights.T)  # [E, N]
    gate, up = (gate_up @ tokens.T).chunk(2, dim=1)  # 2 × [E, I, N]
    inner = act_fn(gate) * up * spread[:, None].to(gate.dtype)
    # Copies the weights, but row by row: a tenth of the time that the product takes for a block of
    # tokens.
    return (down.transpose(0, 1).flatten(1) @ inner.flatten(0, 1)).T.to(tokens.dtype)


def routed(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    act_fn: Callable[[Tensor], Tensor],
) -> Tensor:
    """Pairs sorted by expert, two products for each expert, results added where their tokens stand.

    Waits for the device once, for the number of pairs of every expert; on a CPU that costs nothing.
    """
    order = index.flatten().argsort(stable=True)  # [N * K] pairs, sorted by expert
    counts = index.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    token = order // index.shape[1]
    pairs = token, tokens.index_select(0, token), weights.flatten().index_select(0, order)[:, None]
    output = torch.zeros_like(tokens)
    for expert, (token, rows, weight) in enumerate(
        zip(*(each.split(counts) for each in pairs), strict=True)
    ):
        if len(rows):
            gate, up = F.linear(rows, gate_up[expert].to(rows.dtype)).chunk(2, dim=-1)
            inner = act_fn(gate) * up * weight.to(gate.dtype)
            output.index_add_(
                0, token, F.linear(inner, down[expert].to(rows.dtype)).to(output.dtype)
            )
    return output


def best_experts_implementation(num_experts: int, device: torch.device) -> str | None:
    """What runs a block of tokens fastest; None leaves it to transformers.

    `dense_mm` for few experts on a CPU, `fused_moe` wherever Triton compiles.
    """
    if device.type == "cpu":
        return "dense_mm" if num_experts <= 16 else None
    return "fused_moe" if implementation(device) == "triton" else None


def register() -> None:
    """Add our experts implementations to transformers' table."""
    ALL_EXPERTS_FUNCTIONS.register("dense_mm", dense_mm_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register("fused_moe", fused_moe_experts_forward)
