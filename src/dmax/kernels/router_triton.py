"""The Triton path of `router.py` after the product: a kernel with one program for each token."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _select_kernel(  # type: ignore[no-untyped-def]
    logits, bias, index, weights, num_experts, scaling,
    K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token's experts. BLOCK_G groups have BLOCK_E places; empty places never win."""
    token = tl.program_id(0)
    group = tl.arange(0, BLOCK_G)[:, None]
    member = tl.arange(0, BLOCK_E)[None, :]
    expert = group * SIZE + member  # [BLOCK_G, BLOCK_E]
    exists = (group < GROUPS) & (member < SIZE)
    score = tl.sigmoid(tl.load(logits + token * num_experts + expert, mask=exists, other=0.0))
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=exists, other=0.0)
    choice = tl.where(exists, choice, float("-inf"))
    if KEPT < GROUPS:
        strength, best = tl.max(choice, axis=1, return_indices=True)  # [BLOCK_G]
        if SIZE > 1:
            others = tl.where(member == best[:, None], float("-inf"), choice)
            strength += tl.max(others, axis=1)
        order = tl.arange(0, BLOCK_G)
        is_stronger = strength[None, :] > strength[:, None]
        is_tied = strength[None, :] == strength[:, None]
        is_ahead = is_stronger | (is_tied & (order[None, :] < order[:, None]))
        rank = tl.sum(is_ahead.to(tl.int32), axis=1)
        choice = tl.where((rank < KEPT)[:, None], choice, float("-inf"))

    choice = tl.reshape(choice, (BLOCK_G * BLOCK_E,))
    score = tl.reshape(score, (BLOCK_G * BLOCK_E,))
    place = tl.arange(0, BLOCK_G * BLOCK_E)
    column = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_K,), tl.float32)
    for rank in tl.static_range(K):
        _, best = tl.max(choice, axis=0, return_indices=True)
        is_best = place == best
        choice = tl.where(is_best, float("-inf"), choice)
        best_score = tl.sum(tl.where(is_best, score, 0.0), axis=0)
        chosen = tl.where(column == rank, best_score, chosen)
        found = best // BLOCK_E * SIZE + best % BLOCK_E
        found = tl.minimum(found, num_experts - 1)  # a NaN may win at any place
        tl.store(index + token * K + rank, found.to(tl.int64))
    if NORMALIZE:
        chosen = chosen / (tl.sum(chosen, axis=0) + 1e-20)
    tl.store(weights + token * K + column, chosen * scaling, mask=column < K)


def select_experts(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int = 1,
    num_kept_groups: int = 1,
    normalizes: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`dmax.kernels.router.select_experts` for float32 logits; ties go to the lowest index."""
    num_tokens, num_experts = logits.shape
    index = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    size = num_experts // num_groups
    kernel: Any = _select_kernel
    kernel[(num_tokens,)](
        logits.contiguous(), bias, index, weights, num_experts, scaling,
        K=top_k, GROUPS=num_groups, KEPT=num_kept_groups, SIZE=size,
        HAS_BIAS=bias is not None, NORMALIZE=normalizes,
        BLOCK_G=triton.next_power_of_2(num_groups), BLOCK_E=triton.next_power_of_2(size),
        BLOCK_K=triton.next_power_of_2(top_k), num_warps=1,
    )  # fmt: skip
    return index, weights
