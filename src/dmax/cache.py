"""Keys and values of what is already settled, for decoding block by block.

Shapes: B sequences (slots), L new positions, T positions a slot can hold, G key/value heads, d head
size, D hidden size. Newer releases of transformers pass further arguments to `update`, which have
no use here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmax.environment import total_memory
from dmax.errors import InputError


class BlockCache:
    """Preallocated keys and values for block-by-block decoding of several sequences ("slots").

    A slot holds its committed prefix, `lengths[slot]` positions whose keys and values come from
    final tokens. A forward writes its block in place behind the prefix; the next forward overwrites
    it, unless it was committed. Each layer has a tensor [slots, T, G, d] of its own; compiled code
    that writes into a part of one copies all of it.

    Attributes:
        ends: [slots, T / L, D], the last hidden state of every block, where a model whose reading
            is shifted finds the first prediction of the next one; None for other models.
        rotary: what a model keeps here of the rotations at all positions, as CUDA graphs of steps
            over this cache read it where it is.
        spare_slot: of rows that only fill a batch up; None where there are none.
    """

    rotary: tuple[Tensor, Tensor] | None = None

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
        ends: tuple[int, int] | None = None,
    ) -> None:
        """`ends` is (L, D) where the ends of blocks are kept.

        Raises:
            InputError: the device has less memory than all that takes.
        """
        shape = (num_slots, capacity, num_key_value_heads, head_dim)
        self._block_length, hidden_size = ends or (capacity, 0)
        ends_shape = (num_slots, capacity // self._block_length, hidden_size)
        needed = (2 * num_layers * math.prod(shape) + math.prod(ends_shape)) * dtype.itemsize
        there = total_memory(device)
        if there is not None and needed > there:
            raise InputError(
                f"keys and values of {num_slots} sequences of {capacity} positions take "
                f"{needed / 2**30:.1f} GiB, {device} has {there / 2**30:.1f}",
                hint="lower `max_batch_size`, `max_length` or `max_new_tokens`",
            )
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.ends = torch.zeros(ends_shape, dtype=dtype, device=device) if ends else None
        self.lengths = [0] * num_slots
        self.spare_slot: int | None = None

    @property
    def capacity(self) -> int:
        """Positions a slot can hold."""
        return self.keys[0].shape[1]

    def write_at(
        self, slots: list[int], length: int, block_length: int | None = None
    ) -> CacheWindow:
        """A window for one forward of `length` new positions after the prefix of each slot.

        Args:
            slots: one for each row, or for each length / L neighbouring rows.
            length: a multiple of L where there is one.
            block_length: L; each block of L positions is a row of its own, and the window is in
                place. None: the positions of a slot are one row.

        Raises:
            ValueError: the new positions would not fit.
        """
        most = max(self.lengths[slot] for slot in slots)
        if most + length > self.capacity:
            raise ValueError(
                f"{most} committed and {length} new positions exceed the capacity {self.capacity}"
            )
        each = block_length or length
        places = [
            (slot, self.lengths[slot] + offset)
            for slot in slots
            for offset in range(0, length, each)
        ]
        columns = tuple(zip(*places, strict=True))
        slot, start = torch.tensor(columns).to(self.keys[0].device)  # one transfer, not two
        in_order = slots == list(range(len(slots)))
        in_place = block_length is not None
        return CacheWindow(self, slot, start, start, each, most + length, in_order, in_place)

    def read(self, slot: int, start: int, end: int) -> tuple[Tensor, ...]:
        """Copies of what is kept of positions start to end - 1, which are whole blocks.

        Returns:
            Keys and values, each [layers, n, G, d], and the ends [1, n / L, D] if there are any.
        """
        keys = torch.stack([store[slot, start:end] for store in self.keys])
        values = torch.stack([store[slot, start:end] for store in self.values])
        if self.ends is None:
            return keys, values
        blocks = slice(start // self._block_length, end // self._block_length)
        return keys, values, self.ends[None, slot, blocks].clone()

    def write(self, slot: int, keys: Tensor, values: Tensor, ends: Tensor | None = None) -> None:
        """Append what `read` returns to a slot, and commit it."""
        start = self.lengths[slot]
        end = start + keys.shape[1]
        self.lengths[slot] = end
        for store, new in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            store[slot, start:end] = new
        if self.ends is not None and ends is not None:
            self.ends[slot, start // self._block_length : end // self._block_length] = ends[0]

    def keep_ends(self, hidden: Tensor, window: CacheWindow) -> None:
        """Keep the last state of each block of a forward over whole blocks, [B, P, D]."""
        assert self.ends is not None
        length = self._block_length
        blocks = window.positions[:, ::length] // length  # [B, P / L]
        self.ends.index_put_((window.slots[:, None], blocks), hidden[:, length - 1 :: length])

    def shifted(self, hidden: Tensor, slots: Tensor, starts: Tensor, bases: Tensor) -> Tensor:
        """The hidden states of blocks, each in the place of the position after it.

        All blocks leave their ends before any is read, as with keys and values: a block's first
        state may be that of another row. What has nothing before it keeps its own.

        Args:
            hidden: [N, L, D] of N blocks.
            slots: [N] int64, where their ends are kept.
            starts: [N] int64, their places in the cache, as `CacheWindow` has them.
            bases: [N] int64, the positions before them.

        Returns:
            [N, L, D]: at each position what predicts its token.
        """
        assert self.ends is not None
        length = self._block_length
        self.ends.index_put_((slots, starts // length), hidden[:, -1])
        before = self.ends[slots, bases // length - 1]  # [N, D]
        first = torch.where(bases[:, None] > 0, before, hidden[:, 0])
        return torch.cat((first[:, None], hidden[:, :-1]), dim=1)

    def commit(self, slots: list[int], num: int) -> None:
        """Make the next `num` positions of these slots, which have been written, final."""
        for slot in slots:
            self.lengths[slot] += num

    def clear(self, slot: int) -> None:
        """Forget a slot that may hold NaN, which no mask hides: zero times NaN is NaN."""
        for store in (*self.keys, *self.values):
            store[slot].zero_()
        if self.ends is not None:
            self.ends[slot].zero_()
        self.release(slot)

    def release(self, slot: int) -> None:
        """Make a slot free for another sequence."""
        self.lengths[slot] = 0


@dataclass(eq=False)
class CacheWindow:
    """One forward's access to a `BlockCache`; what attention layers call `past_key_values`.

    Attributes:
        cache: where keys and values lie.
        slots: [B] int64, a slot for each row.
        starts: [B] int64, where the new positions go.
        bases: [B] int64, how many positions a row sees before its own, `starts` as a rule.
        length: new positions L.
        span: positions that are read, at least the highest start + L.
        in_order: the slots are 0..B-1, the common case, and are read without a copy.
        in_place: each row is one block that sees all of its base and of itself, and attention reads
            it where it lies (`dmax.kernels.block_attention`): neither mask, `span` nor `in_order`
            matter. Otherwise only the mask says what a row sees.
    """

    cache: BlockCache
    slots: Tensor
    starts: Tensor
    bases: Tensor
    length: int
    span: int
    in_order: bool
    in_place: bool
    _positions: Tensor | None = None
    _idle: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """[B, L] int64, where the rows stand in their slots; spelt out once for all layers."""
        if self._positions is None:
            offsets = torch.arange(self.length, device=self.starts.device)
            self._positions = self.starts[:, None] + offsets
        return self._positions

    @property
    def idle(self) -> Tensor | None:
        """[B] bool, rows that only fill the batch up; None if there cannot be any."""
        spare = self.cache.spare_slot
        if spare is None or len(self.slots) == 1:
            return None
        if self._idle is None:  # no `cached_property`: the compiler of forwards refuses its lock
            self._idle = self.slots == spare
        return self._idle

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the window at most; callers pass `positions`, as rows differ."""
        return self.span - self.length

    def update(self, key: Tensor, value: Tensor, layer_idx: int, **_: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, G, L, d], and return what is read, each [B, G, span, d].

        Positions past a row's own end hold old numbers: the attention mask must hide them.

        Raises:
            InputError: the layer has other heads than the configuration says.
        """
        keys = self._write_and_read(self.cache.keys[layer_idx], key)
        return keys, self._write_and_read(self.cache.values[layer_idx], value)

    def _write_and_read(self, store: Tensor, new: Tensor) -> Tensor:
        if new.shape[1::2] != store.shape[2:]:
            raise InputError(
                f"a layer has {new.shape[1]} heads of {new.shape[3]} for keys and values, "
                f"config.json says {store.shape[2]} of {store.shape[3]}",
                hint="correct `num_key_value_heads` and `head_dim` there",
            )
        written = self.slots[:, None], self.positions
        store.index_put_(written, new.transpose(1, 2).to(store.dtype))
        rows = slice(len(self.slots)) if self.in_order else self.slots
        return store[rows, : self.span].transpose(1, 2)
