"""Rows of the input table that do not learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_gradient(embeddings: nn.Module, row: int | None) -> Iterator[None]:
    """A `with` block in which one row of an input table gets no gradient; None: every row gets one.

    This is `padding_idx` of torch. A head that is tied to the table still moves the row.

    Args:
        embeddings: an `nn.Embedding`, or an adapter's module around one.
        row: a token id.
    """
    tables = [module for module in embeddings.modules() if isinstance(module, nn.Embedding)]
    before = [table.padding_idx for table in tables]
    for table in tables:
        table.padding_idx = row
    try:
        yield
    finally:
        for table, padding_idx in zip(tables, before, strict=True):
            table.padding_idx = padding_idx
