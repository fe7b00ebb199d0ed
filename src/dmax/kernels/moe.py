"""Mixture-of-experts forwards, registered in transformers' experts interface beside `eager` and `grouped_mm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


def dense_mm_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run every token through every expert in two large products and weight the outcome; unchosen experts weigh 0.

    E/K times the arithmetic of a routed forward, but no sorting, gathering or scattering and no data-dependent shape:
    the fastest way on a CPU for a handful of experts. Tokens [N, D], index and weights [N, K] to [N, D].
    """
    num_experts, _, hidden = experts.gate_up_proj.shape
    weights = torch.zeros(hidden_states.shape[0], num_experts, dtype=top_k_weights.dtype, device=hidden_states.device)
    weights = weights.scatter(1, top_k_index, top_k_weights)  # [N, E]
    gate_up = hidden_states @ experts.gate_up_proj.flatten(0, 1).T  # [N, E * 2I]
    gate, up = gate_up.unflatten(-1, (num_experts, 2, -1)).unbind(-2)  # 2 × [N, E, I]
    inner = experts.act_fn(gate) * up * weights[..., None].to(gate_up.dtype)
    down = experts.down_proj.transpose(1, 2).reshape(-1, hidden)  # [E * I, D]
    return (inner.flatten(1) @ down).to(hidden_states.dtype)


def best_experts_implementation(num_experts: int, device: torch.device) -> str | None:
    """What runs a block of tokens fastest: `dense_mm` for few experts on a CPU; None leaves it to transformers."""
    return "dense_mm" if device.type == "cpu" and num_experts <= 16 else None


def register() -> None:
    """Add our experts implementations to transformers' table."""
    ALL_EXPERTS_FUNCTIONS.register("dense_mm", dense_mm_experts_forward)
