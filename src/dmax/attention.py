"""Who sees whom in attention: visibility, the masks that follow from it, and how they are applied.

A predicate maps query and key indices (broadcastable int64 tensors) to True where a key is visible.

Shapes: B sequences, L queries, S keys, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

Predicate = Callable[[Tensor, Tensor], Tensor]
FLEX = "flex_attention"


@dataclass(frozen=True)
class Staircase:
    """Whole blocks of queries at the end of the keys see what is before them, and themselves.

    This is `block_causal` for the last part of a prompt, without a tensor of all pairs. "sdpa" of
    our own models takes it for a mask.
    """

    block_length: int


Mask = Tensor | BlockMask | Staircase | None


def block_causal(block_length: int) -> Predicate:
    """Bidirectional within a block and causal across blocks, as in block diffusion."""
    return lambda query, key: key // block_length <= query // block_length


def noisy_clean(block_length: int, length: int) -> Predicate:
    """Visibility in training over [noisy | clean], each `length` positions (paper, section 3.1).

    A noisy block sees itself and the clean blocks strictly before it. A clean block sees the clean
    blocks up to itself. Clean positions never see noisy ones. So their keys and values do not
    depend on the noise, and can be computed once (D7 in docs/paper.md).

    Noisy blocks may stand in buffers, like several open blocks in decoding. The p-th block after
    the first of its buffer has indices p lengths lower. It sees the noisy blocks of its buffer up
    to itself, and the clean blocks before the buffer.
    """

    def visible(query: Tensor, key: Tensor) -> Tensor:
        query_block = query % length // block_length
        key_block = key % length // block_length
        query_copy = query // length  # 1 is clean, 0 noisy, and -p noisy in place p of a buffer
        key_copy = key // length
        query_is_clean = query_copy == 1
        key_is_clean = key_copy == 1
        start = query_block + query_copy  # the first block of the buffer
        is_in_buffer = (key_block + key_copy == start) & (key_block <= query_block)
        noisy_sees = torch.where(key_is_clean, key_block < start, is_in_buffer)
        clean_sees = key_is_clean & (key_block <= query_block)
        return torch.where(query_is_clean, clean_sees, noisy_sees)

    return visible


def dense_mask(predicate: Predicate, query_index: Tensor, key_index: Tensor) -> Tensor:
    """A predicate at indices [..., L] and [..., S] int64, as a bool mask [..., L, S]."""
    return predicate(query_index[..., :, None], key_index[..., None, :])


def training_mask(
    predicate: Predicate, query_index: Tensor, key_index: Tensor, implementation: str | None
) -> Tensor | BlockMask:
    """A predicate at the positions of every sequence, in the form that suits an implementation.

    `flex_attention` gets a `BlockMask` made from the predicate, so that no mask of all pairs is
    ever there and its kernel skips what nobody sees.

    Args:
        predicate: who sees whom.
        query_index: [B or 1, L] int64.
        key_index: [B or 1, S] int64.
        implementation: "sdpa", "eager" or "flex_attention".

    Returns:
        A `BlockMask`, or bool [B or 1, 1, L, S].
    """
    if implementation != FLEX:
        return dense_mask(predicate, query_index, key_index)[:, None]
    rows = len(query_index)

    def mask_mod(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch if rows > 1 else 0  # one row serves all sequences
        return predicate(query_index[row, query], key_index[row, key])

    sizes = (query_index.shape[1], key_index.shape[1])
    return create_block_mask(mask_mod, rows, None, *sizes, device=str(query_index.device))


def flex_from_dense(visible: Tensor) -> BlockMask:
    """A bool mask [B or 1, 1, L, S] as a `BlockMask` for `flex_attention`."""
    masks, _, query_length, key_length = visible.shape

    def mask_mod(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[batch % masks, 0, query, key]

    device = str(visible.device)
    return create_block_mask(mask_mod, masks, None, query_length, key_length, device=device)


def best_for_training(device: torch.device) -> str | None:
    """The attention implementation for training on a device; None leaves it to transformers.

    On a GPU it is `flex_attention`, whose kernel skips what nobody sees: in [noisy | clean] that is
    about three quarters of all pairs. On a CPU it has no gradient.
    """
    return FLEX if device.type == "cuda" else None


@contextmanager
def without_flex(model: Any) -> Iterator[None]:
    """Let a model that attends by `flex_attention` do so by `sdpa` meanwhile, as decoding should.

    Making a `BlockMask` takes longer than a step of decoding does.
    """
    config = model.config  # of which every layer asks anew
    chosen = config._attn_implementation
    config._attn_implementation = "sdpa" if chosen == FLEX else chosen
    try:
        yield
    finally:
        config._attn_implementation = chosen


def prepare_mask(mask: Mask, dtype: torch.dtype, implementation: str | None) -> Mask:
    """Bring a mask into the form that an attention implementation takes.

    Args:
        mask: bool (True = visible) or additive [B or 1, 1, L, S], padding [B, S] (1 = visible), a
            `BlockMask`, a `Staircase`, or None. The last three stay as they are.
        dtype: of the scores.
        implementation: "sdpa", "eager" or "flex_attention".

    Raises:
        ValueError: a mask of another rank.
    """
    if not isinstance(mask, Tensor):
        return mask
    if mask.dim() == 2:
        mask = mask.bool()[:, None, None, :]
    if mask.dim() != 4:
        shape = tuple(mask.shape)
        raise ValueError(f"`attention_mask` must have 2 or 4 dimensions, got shape {shape}")
    is_bool = mask.dtype == torch.bool
    if implementation == FLEX:
        # Inside its kernel transformers would index out of bounds where one mask serves a batch.
        return flex_from_dense(mask if is_bool else mask == 0)
    if not is_bool:
        return mask.to(dtype)
    # `sdpa` would compute these very numbers in every layer. `eager` has no answer where nothing is
    # visible, unless the numbers are finite.
    hidden = float("-inf") if implementation == "sdpa" else torch.finfo(dtype).min
    return mask.new_full(mask.shape, hidden, dtype=dtype).masked_fill_(mask, 0.0)


def sdpa_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Staircase | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, bit for bit, but without its copies of keys and values on a CPU.

    Where there is a mask, transformers repeats keys and values for the query heads that share them.

    Args:
        module: the attention layer.
        query: [B, H, L, d].
        key: [B, G, S, d]; H is a multiple of G.
        value: [B, G, S, d].
        attention_mask: bool or additive [B, 1, L, S], a `Staircase`, or None for "everything
            visible".
        scaling: what the scores are multiplied with.
        dropout: probability that a weight is dropped.
        kwargs: for transformers' function.

    Returns:
        The heads' outputs [B, L, H, d], and None for the weights.
    """
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    if isinstance(attention_mask, Staircase):
        length = attention_mask.block_length
        first = key.shape[2] - query.shape[2] + length
        ends = range(first, key.shape[2] + 1, length)
        blocks = zip(query.split(length, dim=2), ends, strict=True)
        outputs = [attend(block, key[:, :, :end], value[:, :, :end]) for block, end in blocks]
        return torch.cat(outputs, dim=2).transpose(1, 2), None
    if query.device.type != "cpu":
        inputs = module, query, key, value, attention_mask
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(*inputs, scaling=scaling, dropout=dropout, **kwargs)
    return attend(query, key, value, attention_mask, dropout_p=dropout).transpose(1, 2), None


ATTENTION_FUNCTIONS = AttentionInterface()  # other models keep transformers' own functions
ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
