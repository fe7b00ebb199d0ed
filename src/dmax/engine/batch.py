"""The rows of one forward: which blocks go through the model, and where each stands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Row = tuple[int, int, int, int, int]
"""Slot, start, position, row and row before of a block; see `Batch.where`."""
COLUMNS = 5


@dataclass(frozen=True, slots=True)
class Batch:
    """P pending blocks, which are finished and only go into the cache, then B open blocks.

    Every row of the forward is a block of L positions. With branches an open block takes as many
    rows as it has branches: they stand side by side in the cache, at one position of the sequence.

    Attributes:
        numbers: int64, `where` and `pending` side by side, which go to a device in one copy.
        block_length: L.
        num_pending: P.
        num_rows: P + R, with R = B * num_branches.
        num_branches: branches of every open block, 1 without.
        span: positions of the cache that are read.
        in_order: the slots are 0, 1, 2, …, each with one row, so that the cache is read in place.
    """

    numbers: Tensor
    block_length: int
    num_pending: int
    num_rows: int
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
        numbers, where, tokens = _numbers(block_length, len(pending), len(rows))
        where[:] = columns
        if pending:
            tokens[:] = pending
        slots, starts, *_ = columns
        span = max(starts) + block_length
        in_order = slots == tuple(range(len(slots)))
        sizes = len(pending), len(rows), num_branches, span
        return cls(numbers, block_length, *sizes, in_order)

    def filled(self, spare: Row) -> Batch:
        """Pending and open blocks filled up to powers of two with a row that nobody uses."""
        num_open = self.num_rows - self.num_pending
        num_pending = power_of_two(self.num_pending)
        num_rows = num_pending + power_of_two(num_open // self.num_branches) * self.num_branches
        if num_rows == self.num_rows:
            return self
        numbers, where, tokens = _numbers(self.block_length, num_pending, num_rows)
        own = self.where.numpy()
        where.T[:] = spare
        where[:, : self.num_pending] = own[:, : self.num_pending]
        where[:, num_pending : num_pending + num_open] = own[:, self.num_pending :]
        tokens[: self.num_pending] = self.pending.numpy()
        sizes = num_pending, num_rows, self.num_branches, self.span
        return Batch(numbers, self.block_length, *sizes, in_order=False)

    @property
    def where(self) -> Tensor:
        """[5, P + R] int64, where each row stands.

        A slot of the cache, the position of the cache where keys and values go, the position of the
        block in its sequence, the row of `OpenBlocks` that holds it (-1: pending), and the row
        there of the open block before it (-1: there is none). Each of the five begins at a multiple
        of 16 bytes: kernels would have code of their own for others.
        """
        return self.numbers.as_strided((COLUMNS, self.num_rows), (_width(self.num_rows), 1))

    @property
    def pending(self) -> Tensor:
        """[P, L] int64, the tokens of the pending blocks."""
        tokens = self.numbers[COLUMNS * _width(self.num_rows) :]
        return tokens.view(self.num_pending, self.block_length)

    @property
    def rows(self) -> Tensor:
        """[B] int64, rows of `OpenBlocks` that hold the open blocks."""
        return self.where[3, self.num_pending :: self.num_branches]

    @property
    def starts(self) -> Tensor:
        """[B] int64, the positions in their sequences of the open blocks."""
        return self.where[2, self.num_pending :: self.num_branches]

    @property
    def before(self) -> Tensor:
        """[B] int64, the rows there of the open blocks before them; -1 where there is none."""
        return self.where[4, self.num_pending :: self.num_branches]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return replace(self, numbers=self.numbers.to(device))


def _numbers(block_length: int, num_pending: int, num_rows: int) -> tuple[Any, ...]:
    """Numbers of a batch on the host, all 0, and as arrays their parts `where` and `pending`."""
    end = COLUMNS * _width(num_rows)
    numbers = np.zeros(end + num_pending * block_length, np.int64)
    where = numbers[:end].reshape(COLUMNS, -1)[:, :num_rows]
    return torch.from_numpy(numbers), where, numbers[end:].reshape(num_pending, block_length)


def _width(num_rows: int) -> int:
    """Numbers from one column of `where` to the next."""
    return num_rows + num_rows % 2


def power_of_two(number: int) -> int:
    """The next power of two; 0 stays 0."""
    return 1 << (number - 1).bit_length() if number else 0
