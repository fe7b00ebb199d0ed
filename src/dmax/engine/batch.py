"""The rows of one forward: which blocks go through the model, and where each stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Row = tuple[int, int, int, int, int]
"""Slot, start, position, row and row before of a block; see `Batch.where`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """P pending blocks, which are final and only go into the cache, then B open blocks.

    Every row of the forward is a block of L positions. With branches an open block takes as many
    rows as it has branches: they stand side by side in the cache, at one position of the sequence.

    Attributes:
        where: [5, P + R] int64. Every row has a slot of the cache, the position of the cache where
            its keys and values go, the position of its block in the sequence, the row of
            `OpenBlocks` that holds it (-1: pending), and the row there of the open block before it
            (-1: there is none).
        pending: [P, L] int64, the tokens of the pending blocks.
        num_branches: branches of every open block, 1 without.
        span: positions of the cache that are read.
        in_order: the slots are 0, 1, 2, …, each with one row, so that the cache is read in place.
    """

    where: Tensor
    pending: Tensor
    num_branches: int
    span: int
    in_order: bool

    @classmethod
    def of(
        cls,
        rows: list[Row],
        pending: list[tuple[int, ...]],
        block_length: int,
        num_branches: int = 1,
    ) -> Batch:
        """A batch on the host.

        Args:
            rows: of the pending blocks, then of the open ones with their branches.
            pending: tokens of the pending blocks.
            block_length: L.
            num_branches: of every open block.
        """
        columns = list(zip(*rows, strict=True))
        slots, starts, *_ = columns
        return cls(
            where=torch.tensor(columns),
            pending=torch.tensor(pending, dtype=torch.long).view(-1, block_length),
            num_branches=num_branches,
            span=max(starts) + block_length,
            in_order=slots == tuple(range(len(slots))),
        )

    @property
    def num_pending(self) -> int:
        """P."""
        return len(self.pending)

    @property
    def num_rows(self) -> int:
        """P + R, with R = B * num_branches."""
        return self.where.shape[1]

    @property
    def rows(self) -> Tensor:
        """[B] int64, rows of `OpenBlocks` that hold the open blocks."""
        return self.where[3, self.num_pending :: self.num_branches]

    @property
    def before(self) -> Tensor:
        """[B] int64, the rows there of the open blocks before them; -1 where there is none."""
        return self.where[4, self.num_pending :: self.num_branches]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return replace(self, where=self.where.to(device), pending=self.pending.to(device))
