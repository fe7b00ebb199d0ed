"""Predicates as masks of `flex_attention`, to compare them with dense ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dmax.attention import Predicate


def flex_mask(
    predicate: Predicate, query_length: int, key_length: int, device: torch.device | str
) -> BlockMask:
    """The visibility of a predicate over positions 0, 1, 2, … of queries and keys."""

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return predicate(query, key)

    return create_block_mask(mask_mod, None, None, query_length, key_length, device=str(device))
