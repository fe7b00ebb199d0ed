"""The ids and the block length that decoding and training need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The special token ids of a checkpoint and its block length.

    Attributes:
        mask_token_id: MASK; it lies in the vocabulary and is never emitted.
        eos_token_ids: every id that ends a sequence; at least one.
        pad_token_id: fills up batches.
        block_length: how many positions are decoded together.
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    block_length: int
