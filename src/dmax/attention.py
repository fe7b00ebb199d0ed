"""Who sees whom: block-causal and [noisy | clean] visibility, as predicates with a dense and a flex form.

A predicate maps query and key indices (broadcastable int64 tensors) to True where the key is
visible. The dense form is a bool tensor for `sdpa` and `eager`; the flex form is a `BlockMask` for
`flex_attention`. Both come from the same predicate, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Predicate = Callable[[Tensor, Tensor], Tensor]


def block_causal(block_length: int) -> Predicate:
    """Bidirectional within a block, causal across blocks (block diffusion)."""
    return lambda query, key: key // block_length <= query // block_length


def noisy_clean(block_length: int, length: int) -> Predicate:
    """Training visibility over [noisy | clean], each half `length` positions (paper section 3.1, D7).

    A noisy block sees itself and the clean blocks strictly before it; a clean block sees clean
    blocks up to itself. Clean positions never see noisy ones, so their keys and values do not
    depend on the noise.
    """

    def visible(query: Tensor, key: Tensor) -> Tensor:
        query_block = query % length // block_length
        key_block = key % length // block_length
        query_clean = query >= length
        key_clean = key >= length
        noisy_sees = torch.where(key_clean, key_block < query_block, key_block == query_block)
        return torch.where(query_clean, key_clean & (key_block <= query_block), noisy_sees)

    return visible


def dense_mask(predicate: Predicate, query_index: Tensor, key_index: Tensor) -> Tensor:
    """`query_index` [..., Q] and `key_index` [..., K] int64 to a bool mask [..., Q, K], True = visible."""
    return predicate(query_index[..., :, None], key_index[..., None, :])


def flex_mask(
    predicate: Predicate, query_length: int, key_length: int, device: torch.device | str
) -> BlockMask:
    """The same visibility as a `BlockMask` over positions 0..Q-1 and 0..K-1, for `flex_attention`."""

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return predicate(query, key)

    return create_block_mask(mask_mod, None, None, query_length, key_length, device=str(device))


def flex_from_dense(visible: Tensor) -> BlockMask:
    """A dense bool mask [B or 1, 1, Q, K], True = visible, as a `BlockMask`; one mask may serve any batch."""
    masks, _, query_length, key_length = visible.shape

    def mask_mod(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[batch % masks, 0, query, key]

    return create_block_mask(
        mask_mod, masks, None, query_length, key_length, device=str(visible.device)
    )


def prepare_mask(mask: Any, dtype: torch.dtype, implementation: str | None) -> Any:
    """One form of mask per attention implementation, from bool or additive [B, 1, L, T + L] or padding [B, T + L].

    Raises:
        ValueError: a mask of another rank.
    """
    if not isinstance(mask, Tensor):
        return mask  # None, or flex_attention's BlockMask
    if mask.dim() == 2:
        mask = mask.bool()[:, None, None, :]
    if mask.dim() != 4:
        raise ValueError(
            f"`attention_mask` must have 2 or 4 dimensions, got shape {tuple(mask.shape)}"
        )
    if implementation == "flex_attention":
        # transformers would index the dense mask inside the kernel, out of bounds where one mask
        # serves a batch.
        return flex_from_dense(mask if mask.dtype == torch.bool else mask == 0)
    if mask.dtype == torch.bool:
        # `sdpa` would turn it into these very numbers in every layer; `eager` has no answer where
        # nothing is visible.
        hidden = float("-inf") if implementation == "sdpa" else torch.finfo(dtype).min
        return torch.full(mask.shape, hidden, dtype=dtype, device=mask.device).masked_fill_(
            mask, 0.0
        )
    return mask.to(dtype)
