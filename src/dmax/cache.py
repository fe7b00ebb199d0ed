"""Keys and values of what is already settled, for decoding block by block.

Shapes: B sequences (slots), L new positions, T positions a slot can hold, G key/value heads, d head
size. Newer releases of transformers pass further arguments to `update`, which have no use here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BlockCache:
    """Preallocated keys and values for block-by-block decoding of several sequences ("slots").

    A slot holds its committed prefix, `lengths[slot]` positions whose keys and values come from
    final tokens. A forward writes its block in place behind the prefix; the next forward overwrites
    it, unless it was committed. Each layer has a tensor [slots, T, G, d] of its own; compiled code
    that writes into a part of one copies all of it.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        capacity: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_slots, capacity, num_key_value_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.lengths = [0] * num_slots

    @property
    def capacity(self) -> int:
        """Positions a slot can hold."""
        return self.keys[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory it holds, all of it from the start."""
        return sum(store.nbytes for store in (*self.keys, *self.values))

    def write_at(self, slots: list[int], length: int) -> CacheWindow:
        """A window for one forward of `length` new positions behind the prefix of each of the `slots`.

        Raises:
            ValueError: the new positions would not fit.
        """
        starts = [self.lengths[slot] for slot in slots]
        if max(starts) + length > self.capacity:
            raise ValueError(
                f"{max(starts)} committed and {length} new positions exceed the capacity {self.capacity}"
            )
        places = torch.tensor((slots, starts)).to(self.keys[0].device)  # one transfer, not two
        in_order = slots == list(range(len(slots)))
        return CacheWindow(self, places[0], places[1], length, max(starts) + length, in_order)

    def read(self, slot: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values of positions start..end-1 of a slot, each [layers, end - start, G, d]."""
        keys, values = (
            [store[slot, start:end] for store in stores] for stores in (self.keys, self.values)
        )
        return torch.stack(keys), torch.stack(values)

    def write(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Append keys and values [layers, n, G, d] to what is committed in a slot, and commit them."""
        start = self.lengths[slot]
        end = self.lengths[slot] = start + keys.shape[1]
        for store, new in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            store[slot, start:end] = new

    def commit(self, slots: list[int], lengths: list[int]) -> None:
        """Declare the first `lengths[slot]` positions written so far final."""
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length

    def rollback(self, slot: int, length: int = 0) -> None:
        """Forget all but the first `length` positions of a slot; with 0 the slot is free for another sequence."""
        self.lengths[slot] = min(self.lengths[slot], length)


class CacheWindow:
    """One forward's access to a `BlockCache`; what attention layers call `past_key_values`.

    Args:
        cache: where keys and values lie.
        slots: [B] int64, a slot for each row.
        starts: [B] int64, committed positions of each.
        length: new positions L.
        span: positions that are read, at least the highest start + L.
        in_order: the slots are 0..B-1, the common case, and are read without a copy.
        bases: [B] int64, if each row is a block that sees the positions before its base, and
            itself; None: it is for the attention mask alone to say.
    """

    def __init__(
        self,
        cache: BlockCache,
        slots: Tensor,
        starts: Tensor,
        length: int,
        span: int,
        in_order: bool,
        bases: Tensor | None = None,
    ) -> None:
        self.cache = cache
        self.span = span
        self.slots = slots
        self.in_order = in_order
        self.starts = starts
        self.bases = bases
        # [B, L] positions the rows' queries stand at
        self.positions = starts[:, None] + torch.arange(length, device=starts.device)
        self._places = slots[:, None], self.positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the window; rows differ, so callers pass `positions` as position ids instead."""
        return self.span - self.positions.shape[1]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, **_: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, G, L, d] in place; returns all that attention may see, [B, G, span, d].

        Positions past a row's own end are stale: the attention mask must hide them.
        """
        seen = []
        for store, new in (
            (self.cache.keys[layer_idx], key),
            (self.cache.values[layer_idx], value),
        ):
            store.index_put_(self._places, new.transpose(1, 2).to(store.dtype))
            rows = (
                store[: len(self.slots), : self.span]
                if self.in_order
                else store[self.slots, : self.span]
            )
            seen.append(rows.transpose(1, 2))
        return seen[0], seen[1]
