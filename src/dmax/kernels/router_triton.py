"""The Triton path of `router.py`: from tokens to lists of pairs by expert, in two kernels.

A pair is one token with one of its experts. `_logits_kernel` spreads the product over the whole
GPU, in parts along the hidden size. `_select_kernel` has a program for each token, which adds the
parts up, chooses, and enters the token in the lists of its experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.kernels.pdl_triton import begin, launch_options

PARTS = (
    8  # of a product; always as many, so that a token does not depend on the others of its batch
)


Lists = tuple[Tensor, Tensor, Tensor, Tensor]


class Routing(NamedTuple):
    """The pairs of every expert.

    Attributes:
        weights: [N, K], of the router.
        pairs: [E, C] int32; the first `counts` of a row are the expert's pairs, in any order. Pair
            n * num_terms + k is the token n with its k-th expert.
        experts: [E] int32, of which the first `active` are the experts to look at, in any order.
        counts: [E] int32, of pairs.
        active: [1] int32.
        num_terms: outputs that every token has, K or more.
    """

    weights: Tensor
    pairs: Tensor
    experts: Tensor
    counts: Tensor
    active: Tensor
    num_terms: int


@triton.jit
def _logits_kernel(  # type: ignore[no-untyped-def]
    tokens, weight, logits, counts, active, num_tokens, num_experts, hidden, part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`logits` [PARTS, N, E]: products of tokens [N, D] and experts [E, D] over a part of D.

    It also empties the lists that the next kernel fills.
    """
    begin(PDL)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum((tl.program_id(1) + 1) * part, hidden)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.program_id(1) * part, end, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        mask = (token < num_tokens)[:, None] & (column < end)[None, :]
        a = tl.load(tokens + token[:, None] * hidden + column[None, :], mask, other=0.0)
        mask = (expert < num_experts)[None, :] & (column < end)[:, None]
        b = tl.load(weight + expert[None, :] * hidden + column[:, None], mask, other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
    at = (tl.program_id(1) * num_tokens + token[:, None]) * num_experts + expert[None, :]
    inside = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    tl.store(logits + at, total, mask=inside)
    if tl.program_id(1) + tl.program_id(2) == 0:
        tl.store(counts + expert, tl.zeros_like(expert), mask=expert < num_experts)
        tl.store(active, 0, mask=tl.program_id(0) == 0)


@triton.jit
def _in_best_groups(  # type: ignore[no-untyped-def]
    choice, member, KEPT: tl.constexpr, SIZE: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """Scores [BLOCK_G, BLOCK_E] of the groups whose two best have the highest sums, others lost."""
    strength, best = tl.max(choice, axis=1, return_indices=True)  # [BLOCK_G]
    if SIZE > 1:
        others = tl.where(member == best[:, None], float("-inf"), choice)
        strength += tl.max(others, axis=1)
    order = tl.arange(0, BLOCK_G)
    is_stronger = strength[None, :] > strength[:, None]
    is_tied = strength[None, :] == strength[:, None]
    is_ahead = is_stronger | (is_tied & (order[None, :] < order[:, None]))
    rank = tl.sum(is_ahead.to(tl.int32), axis=1)
    return tl.where((rank < KEPT)[:, None], choice, float("-inf"))


@triton.jit
def _select_kernel(  # type: ignore[no-untyped-def]
    logits, bias, idle, weights, index, pairs, experts, counts, active,
    num_tokens, num_experts, block_length, scaling,
    PARTS: tl.constexpr, K: tl.constexpr, TERMS: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_IDLE: tl.constexpr, NORMALIZE: tl.constexpr, ROUTES: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token's experts, in `index` or added to their lists.

    BLOCK_G groups have BLOCK_E places; empty places never win.
    """
    begin(PDL)
    token = tl.program_id(0)
    group = tl.arange(0, BLOCK_G)[:, None]
    member = tl.arange(0, BLOCK_E)[None, :]
    expert = group * SIZE + member  # [BLOCK_G, BLOCK_E]
    exists = (group < GROUPS) & (member < SIZE)
    logit = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for part in tl.static_range(PARTS):
        at = logits + (part * num_tokens + token) * num_experts + expert
        logit += tl.load(at, mask=exists, other=0.0)
    score = tl.sigmoid(logit)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=exists, other=0.0)
    choice = tl.where(exists, choice, float("-inf"))
    if KEPT < GROUPS:
        choice = _in_best_groups(choice, member, KEPT, SIZE, BLOCK_G)

    choice = tl.reshape(choice, (BLOCK_G * BLOCK_E,))
    score = tl.reshape(score, (BLOCK_G * BLOCK_E,))
    place = tl.arange(0, BLOCK_G * BLOCK_E)
    column = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_K,), tl.int32)
    factor = tl.zeros((BLOCK_K,), tl.float32)
    for rank in tl.static_range(K):
        _, best = tl.max(choice, axis=0, return_indices=True)  # the lowest of those that tie
        is_best = place == best
        choice = tl.where(is_best, float("-inf"), choice)
        found = best // BLOCK_E * SIZE + best % BLOCK_E
        chosen = tl.where(column == rank, found, chosen)
        factor = tl.where(column == rank, tl.sum(tl.where(is_best, score, 0.0), axis=0), factor)
    chosen = tl.minimum(chosen, num_experts - 1)  # a NaN may win at any place
    if NORMALIZE:
        factor = factor / (tl.sum(factor, axis=0) + 1e-20)
    factor = (factor * scaling).to(weights.dtype.element_ty)
    tl.store(weights + token * K + column, factor, mask=column < K)

    works = column < K
    if HAS_IDLE:
        works &= tl.load(idle + token // block_length + tl.zeros_like(column)) == 0
    if ROUTES:
        # The order within lists changes nothing: each row of a product is computed by itself.
        slot = tl.atomic_add(counts + chosen, 1, mask=works)
        at = pairs + chosen.to(tl.int64) * num_tokens * K + slot
        tl.store(at, token * TERMS + column, mask=works)
        is_first = works & (slot == 0)
        position = tl.atomic_add(active + tl.zeros_like(column), 1, mask=is_first)
        tl.store(experts + position, chosen, mask=is_first)
    else:
        chosen = tl.where(works, chosen, -1)
        tl.store(index + token * K + column, chosen.to(tl.int64), mask=column < K)


@triton.jit
def _route_kernel(  # type: ignore[no-untyped-def]
    index, pairs, experts, counts, active, num_pairs, num_experts,
    K: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """List one expert's pairs in order; all experts are looked at."""
    begin(PDL)
    expert = tl.program_id(0)
    found = tl.zeros((), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_mine = tl.load(index + at, mask=at < num_pairs, other=-1) == expert
        slot = found + tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        pair = at // K * TERMS + at % K
        tl.store(pairs + expert * num_pairs + slot, pair, mask=is_mine)
        found += tl.sum(is_mine.to(tl.int32), axis=0)
    tl.store(counts + expert, found)
    tl.store(experts + expert, expert)
    tl.store(active, num_experts, mask=expert == 0)


def route_tokens(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    idle: Tensor | None,
    num_terms: int,
    top_k: int,
    **settings: Any,
) -> Routing:
    """`dmax.kernels.router.route_tokens`."""
    num_tokens, hidden = tokens.shape
    num_experts = len(weight)
    lists = _lists(num_experts, num_tokens * top_k, tokens.device)
    _, _, counts, active = lists
    shape = PARTS, num_tokens, num_experts
    logits = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    part = triton.cdiv(hidden, PARTS)
    kernel: Any = _logits_kernel
    kernel[triton.cdiv(num_experts, 16), PARTS, triton.cdiv(num_tokens, 32)](
        tokens.contiguous(), weight.contiguous(), logits, counts, active,
        num_tokens, num_experts, hidden, part, BLOCK_M=32, BLOCK_N=16, BLOCK_K=128,
        **launch_options(tokens.device),
    )  # fmt: skip
    choice = logits, bias, idle, tokens.dtype, (lists, num_terms)
    _, weights = _select(*choice, top_k, **settings)
    return Routing(weights, *lists, num_terms)


def route(index: Tensor, weights: Tensor, num_experts: int, num_terms: int) -> Routing:
    """The routing of a choice of experts [N, K] int64; -1 stands for none."""
    num_pairs = index.numel()
    lists = _lists(num_experts, num_pairs, index.device)
    kernel: Any = _route_kernel
    kernel[(num_experts,)](
        index.contiguous(), *lists, num_pairs, num_experts, K=index.shape[1], TERMS=num_terms,
        BLOCK=min(1024, triton.next_power_of_2(num_pairs)), **launch_options(index.device),
    )  # fmt: skip
    return Routing(weights.contiguous(), *lists, num_terms)


def select_experts(
    logits: Tensor, bias: Tensor | None, *settings: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """`dmax.kernels.router.select_experts` for float32 logits; ties go to the lowest index."""
    return _select(logits[None], bias, None, torch.float32, None, *settings, **more)


def _select(
    logits: Tensor,
    bias: Tensor | None,
    idle: Tensor | None,
    dtype: torch.dtype,
    routes: tuple[Lists, int] | None,
    top_k: int,
    num_groups: int = 1,
    num_kept_groups: int = 1,
    normalizes: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Index [N, K] int64 and weights [N, K] of a dtype; with `routes` its lists are filled."""
    parts, num_tokens, num_experts = logits.shape
    index = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=dtype, device=logits.device)
    lists, num_terms = routes or ((index, index, index, index), top_k)
    size = num_experts // num_groups
    kernel: Any = _select_kernel
    kernel[(num_tokens,)](
        logits.contiguous(), bias, idle, weights, index, *lists, num_tokens, num_experts,
        1 if idle is None else num_tokens // len(idle), scaling,
        PARTS=parts, K=top_k, TERMS=num_terms, GROUPS=num_groups, KEPT=num_kept_groups, SIZE=size,
        HAS_BIAS=bias is not None, HAS_IDLE=idle is not None, NORMALIZE=normalizes,
        ROUTES=routes is not None, BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK_E=triton.next_power_of_2(size), BLOCK_K=triton.next_power_of_2(top_k), num_warps=1,
        **launch_options(logits.device),
    )  # fmt: skip
    return index, weights


def _lists(num_experts: int, capacity: int, device: torch.device) -> Lists:
    """Pairs, experts, counts and active of a `Routing`."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return new(num_experts, capacity), new(num_experts), new(num_experts), new(1)
