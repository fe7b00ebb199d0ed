"""Mixture-of-experts forwards, added to transformers' experts interface beside its own.

Shapes: N tokens, D hidden, I inner size, E experts, K experts per token. A pair is one token with
one of its experts.

All forwards take tokens [N, D], and from the router the experts' index [N, K] int64 and weights
[N, K]. Gate and up projections are stacked as [E, 2I, D], down projections as [E, D, I]. The result
is the weighted sum over each token's experts, [N, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from dmax.kernels import autocast_dtype, can_fuse, implementation
from dmax.kernels.quant import QuantizedWeight

Activation = Callable[[Tensor], Tensor]

SILU = (nn.SiLU, type(ACT2FN["silu"]))
# Types of models whose experts are those described above. Others, which may have biases, turned
# weights or a gate that clamps, are left to transformers.
PLAIN_EXPERTS = (
    "ernie4_5_moe",
    "flex_olmo",
    "hy_v3",
    "llada2_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "sarvam_moe",
    "sdar_moe",
)
GROUPED_MULTIPLE = 8  # rows of torch's grouped product are whole multiples of 16 bytes
MAX_FUSED_PAIRS_PER_EXPERT = 128  # for more pairs, large matrix products are faster


def dense_mm_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward for few experts on a CPU: `dense` for few tokens, `routed` for many.

    Sending every token through every expert is E/K times the arithmetic, but in two large products
    and without sorting. From 64 tokens in float32 on, the arithmetic costs more. In bfloat16, where
    products are cheap, it does so from 128 tokens on (measured with E 4, K 2, D 256, I 160, on one
    core and on two). torch.compile cannot trace `routed`, so under it all tokens go the first way.
    """
    enough = 64 if hidden_states.dtype.itemsize >= 4 else 128
    is_dense = torch.compiler.is_compiling() or hidden_states.shape[0] < enough
    forward = dense if is_dense else routed
    weights = experts.gate_up_proj, experts.down_proj
    return forward(hidden_states, top_k_index, top_k_weights, *weights, experts.act_fn)


def fused_moe_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward for many experts on a GPU: Triton kernels for a few blocks of tokens.

    Only shapes, dtypes and the device decide, never values, so a CUDA graph can hold the call. What
    the kernels cannot do goes to `grouped_mm`: gradients, large inputs, other activations than
    SiLU, and expert parallelism.
    """
    weights = experts.gate_up_proj, experts.down_proj
    if (
        can_fuse(hidden_states, top_k_weights)
        and fits_kernels(hidden_states, top_k_index.numel(), *weights)
        and isinstance(experts.act_fn, SILU)
        and not getattr(experts, "_is_expert_parallel", False)
    ):
        return fused_moe(hidden_states, top_k_index, top_k_weights, *weights)
    return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def fits_kernels(tokens: Tensor, num_pairs: int, *weights: Tensor) -> bool:
    """Whether `expert_terms` takes tokens [N, D] with so many pairs, and weights [E, ...] first."""
    return (
        can_fuse(tokens, *weights)
        and all(each.dtype == tokens.dtype and each.device == tokens.device for each in weights)
        and num_pairs <= MAX_FUSED_PAIRS_PER_EXPERT * len(weights[0])
    )


def grouped_mm_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The `grouped_mm` of transformers, within reach of autocast like every other product.

    Torch's grouped product has no autocast rule, and transformers lets it compute in the dtype of
    the weights, which training keeps in float32. Here it gets copies of them in the dtype of
    autocast, if it takes their sizes. Gradients go through the copies to the weights.
    """
    dtype = autocast_dtype(hidden_states)
    sizes = experts.down_proj.shape[1:]
    if dtype is not None and all(size % GROUPED_MULTIPLE == 0 for size in sizes):
        experts = _ExpertsIn(dtype, experts)
    grouped_mm = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return grouped_mm(experts, hidden_states, top_k_index, top_k_weights)


class _ExpertsIn:
    """The experts of a layer with copies of their weights in another dtype."""

    def __init__(self, dtype: torch.dtype, experts: Any) -> None:
        self._experts = experts
        self.gate_up_proj = experts.gate_up_proj.to(dtype)
        self.down_proj = experts.down_proj.to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def fused_moe(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
) -> Tensor:
    """SiLU experts in two Triton kernels; the twin is `routed` with SiLU.

    The kernels read the weights of the experts in use once. They accumulate in float32, and round
    the inner state and each expert's output to the dtype of `tokens`. The sum over a token's
    experts is in a fixed order. Shapes are static, nothing waits for the device, and there is no
    gradient.

    Args:
        tokens: [N, D] float32, float16 or bfloat16.
        index: [N, K] int64, in [0, E).
        weights: [N, K], any floating dtype.
        gate_up: [E, 2I, D] in the dtype of `tokens`, or quantised.
        down: [E, D, I] likewise.
    """
    from dmax.kernels import router_triton

    num_experts = gate_up.shape[0]
    routing = router_triton.route(index, weights, num_experts, index.shape[1])
    return expert_terms(tokens, routing, gate_up, down).sum(dim=1)


def expert_terms(
    tokens: Tensor,
    routing: Any,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    is_whole: bool = True,
) -> Tensor:
    """The outputs of each token's experts, weighted and still to be summed, [N, T, D].

    Args:
        tokens: [N, D], as in `fused_moe`.
        routing: what `route_tokens` gives for T terms: one for each of the K experts, and one more
            with `shared`.
        gate_up: as in `fused_moe`.
        down: as in `fused_moe`.
        shared: gate and up [I, D] and down [D, I] of an expert that every token has.
        is_whole: every token has K experts; otherwise the terms that some lack are zero.
    """
    from dmax.kernels import moe_triton

    weights = stored(gate_up), stored(down)
    return moe_triton.expert_terms(tokens, routing, *weights, shared, is_whole)


def stored(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None, int]:
    """A weight as the kernels take it: numbers, scales, and the columns of an int4 group or 0."""
    if isinstance(weight, Tensor):
        return weight.contiguous(), None, 0
    if weight.is_packed:
        return weight.values.view(torch.int16), weight.scale, weight.group_size
    return weight.values, weight.scale, 0


def dense(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act_fn: Activation,
) -> Tensor:
    """Every token through every expert in two large products; experts not chosen have weight 0.

    No shape depends on the data.
    """
    spread = weights.new_zeros(gate_up.shape[0], tokens.shape[0])
    spread = spread.scatter(0, index.T, weights.T)  # [E, N]
    gate, up = (gate_up @ tokens.T).chunk(2, dim=1)  # 2 × [E, I, N]
    inner = act_fn(gate) * up * spread[:, None].to(gate.dtype)
    # This copies the weights, but row by row: a tenth of the time of a block's product.
    wide = down.transpose(0, 1).flatten(1)  # [D, E * I]
    return (wide @ inner.flatten(0, 1)).T.to(tokens.dtype)


def routed(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    act_fn: Activation,
) -> Tensor:
    """Pairs sorted by expert, two products for each expert, results added to their tokens.

    This waits for the device once, for the number of pairs of every expert. On a CPU that costs
    nothing.
    """
    order = index.flatten().argsort(stable=True)  # [N * K] pairs, sorted by expert
    counts = index.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    output = torch.zeros_like(tokens)
    for expert, pairs in enumerate(order.split(counts)):
        if len(pairs):
            token = pairs // index.shape[1]
            row = tokens.index_select(0, token)
            weight = weights.flatten().index_select(0, pairs)[:, None]
            gate, up = F.linear(row, gate_up[expert].to(row.dtype)).chunk(2, dim=-1)
            inner = act_fn(gate) * up * weight.to(gate.dtype)
            result = F.linear(inner, down[expert].to(row.dtype))
            output.index_add_(0, token, result.to(output.dtype))
    return output


def best_experts_implementation(num_experts: int, device: torch.device | str) -> str | None:
    """The experts implementation that is fastest for a block; None leaves it to transformers.

    It is `dense_mm` for few experts on a CPU, and `fused_moe` wherever Triton compiles. A dense
    model of a family with experts may name None of them.
    """
    device = torch.device(device)
    if device.type in ("cpu", "meta"):  # ranks of one training begin on these two
        return "dense_mm" if num_experts and num_experts <= 16 else None
    return "fused_moe" if implementation(device) == "triton" else None


EXPERTS_FUNCTIONS = ExpertsInterface()  # other models keep transformers' own `grouped_mm`
EXPERTS_FUNCTIONS["grouped_mm"] = grouped_mm_experts_forward


def register() -> None:
    """Add our experts implementations to transformers' table."""
    ALL_EXPERTS_FUNCTIONS.register("dense_mm", dense_mm_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register("fused_moe", fused_moe_experts_forward)
