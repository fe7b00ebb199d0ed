"""One denoising forward as the engine runs it; only this file knows the insides of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmax.checkpoint import Checkpoint
from dmax.engine.batch import Batch
from dmax.engine.graphs import CudaCapture, Replay
from dmax.engine.runner import ModelRunner


def open_block(
    checkpoint: Checkpoint, context: int, *, compiled: bool = False
) -> Callable[[], Tensor]:
    """A forward over an open block at the end of a context; it gives the best tokens [1, L, 1].

    Keys and values of the `context` positions, the block's own among them, are random. The head is
    included.
    """
    model: Any = checkpoint.model
    special_ids = checkpoint.special_ids
    length = special_ids.block_length
    runner = ModelRunner(model, special_ids, 1, context, compiled=compiled)
    for layer in (*runner.cache.keys, *runner.cache.values):
        layer.normal_()
    start = context - length
    row = (0, start, start, 0, -1)
    batch = Batch.of([row], pending=[], block_length=length).to(model.device)
    tokens = torch.randint(model.config.vocab_size, (1, length), device=model.device)
    embeds = runner.embed(tokens).detach()

    def forward() -> Tensor:
        return runner.forward(batch, embeds).top(1).ids

    return forward


def captured(forward: Callable[[], Tensor]) -> Replay:
    """The forward as a CUDA graph."""

    def run() -> None:
        forward()

    return CudaCapture()(run)
