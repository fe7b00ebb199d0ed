"""The blocks of a forward, each a row of its batch: where they stand, on the host and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """A block of a forward.

    Attributes:
        slot: whose block it is.
        start: position in the cache where its keys and values are written.
        base: position of the block; `start`, but for further versions of a block.
        row: of an open block its row in the lane.
        before: of an open block behind another open one that one's row, else -1.
    """

    slot: int
    start: int
    base: int
    row: int = -1
    before: int = -1


class Rows(NamedTuple):
    """A step's rows as tensors: P pending blocks, which are settled and only go into the cache, before R open ones.

    Attributes:
        where: [5, P + R] int64, the fields of `Row`.
        tokens: [P, L] int64, of the pending blocks.
    """

    where: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], tokens: Sequence[Sequence[int]], block_length: int) -> Rows:
        """On the host."""
        blocks = torch.tensor(tokens, dtype=torch.long).view(len(tokens), block_length)
        return cls(torch.tensor(list(zip(*rows, strict=True))), blocks)

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return Rows(self.where.to(device), self.tokens.to(device))


@dataclass(frozen=True, slots=True)
class Shape:
    """What does not vary between steps that can share a captured graph.

    Attributes:
        num_pending: finished blocks P that the forward also writes into the cache.
        num_open: open blocks R, versions of a block included.
        versions: how many versions of each block these are.
        span: positions of the cache that are read.
        in_order: the slots are 0, 1, 2, …, each with one row.
        aligned: the open blocks are the lane's rows 0, 1, 2, …: they are read and written without
            an index.
    """

    num_pending: int
    num_open: int
    versions: int
    span: int
    in_order: bool
    aligned: bool

    @classmethod
    def of(cls, rows: Sequence[Row], num_open: int, block_length: int, versions: int = 1) -> Shape:
        """Of a step over these rows, the last `num_open` of which are open blocks."""
        num_pending = len(rows) - num_open
        span = max(row.start for row in rows) + block_length
        in_order = [row.slot for row in rows] == list(range(len(rows)))
        aligned = [row.row for row in rows[num_pending:]] == list(range(num_open))
        return cls(num_pending, num_open, versions, span, in_order, aligned)
