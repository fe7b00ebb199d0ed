"""One denoising forward as the engine runs it; only this file knows the insides of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmax.checkpoint import Checkpoint
from dmax.engine.graphs import CudaCapture
from dmax.engine.rows import Row, Rows, Shape
from dmax.engine.runner import ModelRunner


def open_block(
    checkpoint: Checkpoint, context: int, *, compiled: bool = False
) -> Callable[[], Tensor]:
    """A forward over an open block at the end of a context; it gives the best tokens [1, L, 1].

    Keys and values of the `context` positions, the block's own among them, are random. The head is
    included.
    """
    model: Any = checkpoint.model
    length = checkpoint.block_length
    mask_id = checkpoint.mask_token_id
    runner = ModelRunner(model, length, 1, context, mask_id, compiled=compiled)
    for layer in (*runner.cache.keys, *runner.cache.values):
        layer.normal_()
    start = context - length
    opened = [Row(slot=0, start=start, base=start, row=0)]
    shape = Shape.of(opened, num_open=1, block_length=length)
    rows = Rows.of(opened, [], length).to(model.device)
    tokens = torch.randint(model.config.vocab_size, (1, length), device=model.device)
    embeds = runner.embed(tokens).detach()

    def forward() -> Tensor:
        return runner.denoise(shape, rows, embeds).top(1).ids

    return forward


def captured(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The forward as a CUDA graph."""
    return CudaCapture()(forward)
