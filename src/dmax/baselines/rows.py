"""Work on rows of logits, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmax.training.vocabulary import CHUNK


def in_chunks(
    function: Callable[[slice], tuple[Tensor, ...]],
    num_rows: int,
    vocab_size: int,
    chunk: int = CHUNK,
) -> tuple[Tensor, ...]:
    """What a function makes of all rows, without the logits of all rows at once.

    Where there are several chunks, backward computes each of them anew.

    Args:
        function: takes which rows of N, and returns tensors [n, …] of them.
        num_rows: N.
        vocab_size: logits of a row.
        chunk: how many logits there may be at once.

    Returns:
        The same tensors [N, …].
    """
    size = max(1, chunk // vocab_size)
    parts = [slice(start, start + size) for start in range(0, max(1, num_rows), size)]
    if len(parts) > 1 and torch.is_grad_enabled():
        done = [checkpoint(function, part, use_reentrant=False) for part in parts]
    else:
        done = [function(part) for part in parts]
    return tuple(torch.cat(tensors) for tensors in zip(*done, strict=True))
